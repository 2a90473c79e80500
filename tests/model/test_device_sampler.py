"""The device sampler: the tokens of ``sampler.sample``, and no waiting."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.engine.constraint import bit_mask
from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import PENDING, Chunk, Draft, Sampled
from prefixd.server.model import token_counts
from prefixd.server.model.decoder import Logits
from prefixd.server.model.device_sampler import DeviceSampler, sample_rows
from prefixd.server.model.sampler import sample
from prefixd.server.model.sampling_plan import Plan, num_bytes, views
from prefixd.server.model.token_counts import OF_PROMPT
from prefixd.server.model.transfer import on_device
from tests.model.device_modes import fake_cuda

DEVICE = torch.device(os.environ.get("PREFIXD_TEST_DEVICE", "cpu"))
GREEDY = SamplingParams(temperature=0)
WIDTHS = [40, 1100, 1536, 2049]
"""Logits of a row: fewer than a head, or more; two of them padded."""


def pool(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of logits; those in 16 bits have many that are equal."""
    generator = torch.Generator().manual_seed(width)
    logits = 2 * torch.randn(64, width, generator=generator)
    logits[-1, 3], logits[-2, 5], logits[-3] = torch.nan, torch.inf, torch.nan
    return logits.to(DEVICE, dtype)


POOLS = {
    (width, dtype): pool(width, dtype)
    for width in WIDTHS
    for dtype in (torch.float32, torch.bfloat16)
}

params_of_a_row = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 64, 65, 1030, 10**9]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.1, 1e-50]),
    min_p=st.sampled_from([0.0, 0.0, 0.2, 1e-4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.6, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {3: 2.0, 7: -100.0}, {0: 100.0}]),
    top_logprobs=st.sampled_from([None, None, 0, 1, 5, 20]),
)


@dataclass
class Text:
    """A sequence as the engine has it."""

    seq_id: int
    params: SamplingParams
    prompt: tuple[int, ...]
    output: list[int] = field(default_factory=list)

    def chunk(self, **more: Any) -> Chunk:
        history = (*self.prompt, *self.output) if self.params.needs_history else ()
        return Chunk(
            self.seq_id,
            [1],
            0,
            [1],
            sampling=self.params,
            history=history,
            num_prompt_tokens=len(self.prompt),
            **more,
        )


def behind(chunk: Chunk) -> Chunk:
    """The chunk while the step that samples its last token is in flight."""
    return replace(chunk, tokens=[PENDING], history=chunk.history[:-1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[Sampled]:
    return sample(Logits(logits), [each for chunk in chunks for each in chunk.positions()])


def masks_of(width: int) -> list[bytes]:
    """Bit masks as wide as the logits, narrower and wider."""
    odd = bit_mask(range(1, width, 2), num_ids=width)
    return [odd, bit_mask([0, 5, 17, width - 1], num_ids=width), odd[:4], odd + bytes(8)]


def comparable(sampled: Sequence[Sampled]) -> list[Sampled]:
    return [s if s.finite else Sampled(0, finite=False) for s in sampled]


@settings(max_examples=80)
@given(data=st.data())
def test_sequences_get_the_tokens_of_the_sampler_in_every_step(data: st.DataObject) -> None:
    """Steps with any of the sequences, in any order; some rows are sampled in a second call, some
    verify proposed tokens, and some are planned before their last token came."""
    draw = data.draw
    width = draw(st.sampled_from(WIDTHS))
    rows = POOLS[width, draw(st.sampled_from([torch.float32, torch.bfloat16]))]
    token = st.integers(0, 30)
    prompts = st.lists(st.one_of(token, st.just(width + 2)), min_size=1, max_size=4)
    texts = [
        Text(number, params, tuple(draw(prompts)))
        for number, params in enumerate(draw(st.lists(params_of_a_row, min_size=1, max_size=6)))
    ]
    sampler = DeviceSampler(DEVICE, num_ids=width, max_rows=draw(st.sampled_from([len(texts), 6])))
    was_drafted = set(range(len(texts)))  # or not sampled yet
    last: set[int] = set()
    for _ in range(draw(st.integers(1, 4))):
        order = draw(st.permutations(texts))
        chosen = order[: draw(st.integers(1, len(texts)))]
        chunks, sent = [], []
        for text in chosen:
            chunk = text.chunk(
                uniform=draw(st.floats(0, 1, exclude_max=True)),
                banned=draw(st.sampled_from([(), (), (4, 9, width + 1), (0,)])),
            )
            chunk.mask = draw(st.sampled_from([None, None, *masks_of(width)]))
            if chunk.mask is None and not draw(st.integers(0, 3)):
                count = draw(st.integers(1, 3))
                chunk.draft = Draft(
                    tokens=draw(st.lists(token, min_size=count, max_size=count)),
                    uniforms=[draw(st.floats(0, 1, exclude_max=True)) for _ in range(count)],
                    num_banned=draw(st.integers(0, count)),
                )
            chunks.append(chunk)
            is_pending = (
                chunk.draft is None
                and text.seq_id in last - was_drafted
                and len(text.output) > 0
                and draw(st.booleans())
            )
            sent.append(behind(chunk) if is_pending else chunk)
        num_rows = sum(1 + chunk.num_drafts for chunk in chunks)
        numbers = draw(st.lists(st.integers(0, 63), min_size=num_rows, max_size=num_rows))
        logits = rows[torch.tensor(numbers)]
        expected = reference(logits, chunks)
        got = in_two_calls(sampler, logits, sent, draw(st.integers(0, len(chunks))))
        assert comparable(got) == comparable(expected)
        last = {chunk.seq_id for chunk in chunks}
        was_drafted = {chunk.seq_id for chunk in chunks if chunk.draft is not None}
        results = iter(expected)
        for text, chunk in zip(chosen, chunks, strict=True):
            mine = chunk.verified([next(results) for _ in range(1 + chunk.num_drafts)])
            if all(s.finite for s in mine):
                text.output += [s.token_id for s in mine]
            else:
                texts.remove(text)
        if not texts:
            break


def in_two_calls(
    sampler: DeviceSampler, logits: torch.Tensor, chunks: Sequence[Chunk], num_late: int
) -> list[Sampled]:
    """Sample the first ``num_late`` chunks after the others. 0: all in one call, as padded rows."""
    if num_late == 0:
        num_rows = len(logits) + 2
        prepared = sampler.prepare(chunks, num_rows=num_rows)
        padded = torch.cat([logits, torch.full_like(logits[:1], torch.nan).expand(2, -1)])
        return sampler.unpack(sampler.run(Logits(padded), prepared), prepared)
    places, start = [], 0
    for chunk in chunks:
        places.append(range(start, start + 1 + chunk.num_drafts))
        start += 1 + chunk.num_drafts
    late, free = list(chunks[:num_late]), list(chunks[num_late:])
    sampled: dict[int, Sampled] = {}
    for part, ranges in ((free, places[num_late:]), (late, places[:num_late])):
        if part:
            rows = [row for each in ranges for row in each]
            prepared = sampler.prepare(part, rows=rows)
            results = sampler.unpack(sampler.run(Logits(logits), prepared), prepared)
            sampled |= dict(zip(rows, results, strict=True))
    return [sampled[row] for row in range(len(logits))]


def test_a_sequence_that_lost_its_row_of_counts_is_counted_again() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.5, repetition_penalty=1.2)
    rows = POOLS[40, torch.float32]
    sampler = DeviceSampler(DEVICE, num_ids=40, max_rows=2)
    texts = [Text(number, params, (1, 2)) for number in range(5)]
    for step in range(20):
        pair = [texts[step % 5], texts[(step * 2 + 1) % 5]] if step % 5 != 4 else [texts[0]]
        chunks = [text.chunk() for text in pair]
        logits = rows[: len(pair)]
        expected = reference(logits, chunks)
        assert sampler.sample(Logits(logits), chunks) == expected
        for text, result in zip(pair, expected, strict=True):
            text.output.append(result.token_id)
    assert sampler.counts.table is not None
    assert len(sampler.counts.table) == 2


def test_a_step_that_is_repeated_counts_its_tokens_once() -> None:
    text = Text(0, SamplingParams(temperature=0, frequency_penalty=3.0), (1,))
    sampler = DeviceSampler(DEVICE, num_ids=40, max_rows=2)
    logits = POOLS[40, torch.float32][:1]
    for _ in range(3):
        for _ in range(2):
            sampled = sampler.sample(Logits(logits), [text.chunk()])
            assert sampled == reference(logits, [text.chunk()])
        text.output.append(sampled[0].token_id)


@pytest.mark.parametrize("failing", [0, 1, 2], ids=["row", "prompt", "output"])
def test_a_sequence_whose_counts_failed_to_be_sent_is_counted_again(
    monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    text = Text(0, SamplingParams(temperature=0, frequency_penalty=0.3), (1,), [7] * 4)
    sampler, calls = DeviceSampler(DEVICE, num_ids=40, max_rows=2), itertools.count()
    logits = torch.linspace(0, 1, 40, device=DEVICE)[None]

    def fail_once(values: Sequence[int], device: torch.device) -> torch.Tensor:
        if next(calls) == failing:
            raise RuntimeError("CUDA error: out of memory")
        return on_device(values, device)

    monkeypatch.setattr(token_counts, "on_device", fail_once)
    with pytest.raises(RuntimeError):
        sampler.prepare([text.chunk()])
    sampler.sample(Logits(logits), [text.chunk()])
    assert sampler.counts.table is not None
    assert sampler.counts.table[0, [1, 7, 39]].tolist() == [OF_PROMPT, 4, 1]


def test_a_draft_whose_counts_failed_to_be_sent_is_counted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = Text(0, SamplingParams(temperature=0, frequency_penalty=0.3), (1,), [7] * 4)
    sampler = DeviceSampler(DEVICE, num_ids=40, max_rows=2)
    draft = Draft([5], [0.0])
    with monkeypatch.context() as patch:
        patch.setattr(token_counts, "on_device", Mock(side_effect=RuntimeError))
        with pytest.raises(RuntimeError):
            sampler.prepare([text.chunk(draft=draft)])
    sampler.prepare([text.chunk(draft=draft)])
    assert sampler.counts.table is not None
    assert sampler.counts.table[0, [1, 7]].tolist() == [OF_PROMPT, 4]


def test_no_counts_are_kept_without_penalties() -> None:
    sampler = DeviceSampler(DEVICE, num_ids=40, max_rows=2)
    sampler.sample(Logits(POOLS[40, torch.float32][:1]), [Text(0, SamplingParams(), (1,)).chunk()])
    assert sampler.counts.table is None


PLANS = {
    "greedy": Plan(rows=8),
    "drawn": Plan(rows=8, plain=8),
    "all": Plan(
        rows=8,
        listed=True,
        plain=2,
        heads=2,
        width=64,
        sorts=2,
        penalised=3,
        drafted=4,
        biases=2,
        bans=8,
        logprobs=3,
        top=4,
    ),
}


@pytest.mark.parametrize("width", [1100, 2048])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_device_is_never_waited_for(plan: Plan, width: int) -> None:
    with fake_cuda() as mode:
        settings_ = torch.empty(max(num_bytes(plan), 1), dtype=torch.uint8, device="cuda")
        counts = torch.empty(8, -(-width // 8) * 8, dtype=torch.int32, device="cuda")
        logits = torch.empty(8, width, dtype=torch.bfloat16, device="cuda")
        packed = sample_rows(Logits(logits), plan, views(settings_, plan), counts)
        assert packed.device.type == "cuda"
        assert packed.shape == (2 * 8 + plan.logprobs * (1 + 2 * plan.top),)
    assert "aten::max.dim" in mode.ops or "aten::max" in mode.ops
