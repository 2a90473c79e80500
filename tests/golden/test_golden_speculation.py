"""Prompt lookup changes no token: on and off over the same requests, in float32."""

import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    PositionLogprobs,
    PrefixHandle,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.engine.sequence import seeded_uniform
from prefixd.server.engine.step import Chunk
from prefixd.server.model.batch import lay_out
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoder import Logits
from prefixd.server.model.sampler import sample
from tests.golden.golden_harness import Served, prompts, tiny_model
from tests.golden.test_golden_mixed import many_prefixes, preempt_often
from tests.model.cpu.native_library import native_library

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SETTINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.1, top_logprobs=2),
    SamplingParams(temperature=0.3, top_logprobs=0),
    SamplingParams(temperature=0.6, top_k=20, frequency_penalty=0.05),
    SamplingParams(temperature=0.5, top_p=0.9, presence_penalty=0.1),
    SamplingParams(temperature=0.4, min_p=0.05, logit_bias={7: 1.5, 8: -50.0}),
]
MARGIN, DRAW = 1e-4, 1e-6
"""A token may differ by rounding where the two largest logits are closer than MARGIN, or the draw
is closer than DRAW to the end of a token's part of the distribution."""


class Answer:
    """The output of one sequence, as its caller gets it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.end: FinishEvent | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            assert len(event.token_ids) <= 1, "an event for each token"
            self.tokens += event.token_ids
            self.logprobs += event.logprobs
        elif isinstance(event, FinishEvent):
            self.end = event


def requests_of(
    texts: list[list[int]], prefixes: list[PrefixHandle | None], *, count: int, n: int = 1
) -> list[AdmittedRequest]:
    """One request for each text, with the settings and prefixes in turn; every third has a stop
    token that it may not sample at first."""
    return [
        AdmittedRequest(
            request_id=str(number),
            tenant="t",
            prompt=tuple(text),
            prefix=prefixes[number % len(prefixes)],
            sampling=replace(SETTINGS[number % len(SETTINGS)], seed=number),
            stop=StopParams(
                max_tokens=count,
                min_tokens=count // 2 if number % 3 == 0 else 0,
                token_ids=frozenset({9, 11}) if number % 3 == 0 else frozenset(),
            ),
            n=n if number % 5 == 0 else 1,
        )
        for number, text in enumerate(texts)
    ]


def answers(served: Served, requests: list[AdmittedRequest]) -> list[Answer]:
    """The answers of all sequences of requests that run together."""
    collected = [[Answer() for _ in range(request.n)] for request in requests]
    ended: queue.Queue[None] = queue.Queue()

    def on_event(number: int, event: Event) -> None:
        collected[number][event.index].add(event)
        if isinstance(event, FinishEvent):
            ended.put(None)

    with served.held():
        for number, request in enumerate(requests):
            served.engine.submit(request, lambda event, number=number: on_event(number, event))  # type: ignore[misc]
    flat = [answer for of_request in collected for answer in of_request]
    for _ in flat:
        ended.get(timeout=120)
    return flat


def speculate_often(served: Served) -> None:
    """Propose tokens at every match, as if rows cost nothing."""
    costs = served.engine.core.scheduler.speculation.costs
    costs.needs_plain = lambda rows: False  # type: ignore[method-assign]
    costs.slowdown = lambda rows, drafts: 1.0  # type: ignore[method-assign]


def check_equal(
    served: Served, requests: list[AdmittedRequest], on: list[Answer], off: list[Answer]
) -> list[str]:
    """Check that answers are equal but for rounding. Returns the differences, in words."""
    owners = [(request, index) for request in requests for index in range(request.n)]
    differences = []
    for (request, index), with_drafts, plain in zip(owners, on, off, strict=True):
        assert with_drafts.end is not None
        assert plain.end is not None
        if with_drafts.tokens == plain.tokens:
            assert (with_drafts.end.reason, with_drafts.end.stop) == (
                plain.end.reason,
                plain.end.stop,
            )
            check_logprobs(with_drafts, plain)
            continue
        pairs = zip(with_drafts.tokens, plain.tokens, strict=False)
        at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        assert at is not None, "one answer is the beginning of the other"
        before = (*request.prompt, *plain.tokens[:at])
        logits = served_logits(served, request.prefix, before)
        uniform = seeded_uniform(request.sampling.seed + index, at)  # type: ignore[operator]
        chunk = chunk_of(request, before, uniform)
        differences.append(f"request {request.request_id}, token {at}")
        assert is_near_tie(logits, chunk), f"a wrong token: {differences[-1]}"
    return differences


def check_logprobs(one: Answer, other: Answer) -> None:
    assert [p.sampled.token_id for p in one.logprobs] == [
        p.sampled.token_id for p in other.logprobs
    ]
    for position, expected in zip(one.logprobs, other.logprobs, strict=True):
        assert position.previous == expected.previous
        assert position.sampled.logprob == pytest.approx(expected.sampled.logprob, abs=1e-3)
        assert len(position.top) == len(expected.top)


def chunk_of(request: AdmittedRequest, tokens: tuple[int, ...], uniform: float) -> Chunk:
    num_output = len(tokens) - len(request.prompt)
    return Chunk(
        0,
        tokens,
        0,
        (),
        sampling=request.sampling,
        uniform=uniform if request.sampling.temperature else 0.0,
        history=tokens,
        num_prompt_tokens=len(request.prompt),
        banned=tuple(request.stop.token_ids) if num_output < request.stop.min_tokens else (),
    )


@torch.inference_mode()
def served_logits(served: Served, prefix: PrefixHandle | None, tokens: tuple[int, ...]) -> Logits:
    """The logits after ``tokens``, computed in one pass in the blocks of an idle engine."""
    decoder = served.runner.decoder
    scheduler = served.engine.core.scheduler
    served.stats()  # waits until the engine is idle
    num_virtual, shared = 0, []
    if prefix is not None:
        entry = scheduler.memory.residency.get(prefix.key)
        assert entry is not None
        num_virtual, shared = entry.num_tokens, entry.blocks
    size = decoder.block_size
    needed = -(-(num_virtual + len(tokens)) // size) - num_virtual // size
    assert needed <= scheduler.memory.pool.num_free - scheduler.memory.pool.num_remembered
    own = scheduler.memory.pool.allocate(needed)
    decoder.zero(own)
    kv = decoder.read_kv(shared, num_virtual) if shared else None
    table = [*shared[: num_virtual // size], *own]
    if kv is not None and num_virtual % size:
        start = num_virtual - num_virtual % size
        decoder.write_kv(table, start, kv[:, start:])
    sampling = SamplingParams(temperature=0)
    logits = decoder.forward(lay_out([Chunk(0, tokens, num_virtual, table, sampling=sampling)]))
    scheduler.memory.pool.release(own)
    return logits


def is_near_tie(logits: Logits, chunk: Chunk) -> bool:
    """Whether rounding may change the token that is sampled from ``logits``."""
    (best,) = sample(logits, [chunk])
    assert chunk.sampling is not None
    if chunk.sampling.temperature:
        nudged = [replace(chunk, uniform=max(0.0, chunk.uniform + by)) for by in (-DRAW, DRAW)]
        tokens = {sample(logits, [each])[0].token_id for each in nudged}
        return tokens != {best.token_id}
    bias = dict(chunk.sampling.logit_bias)
    bias[best.token_id] = bias.get(best.token_id, 0.0) - MARGIN
    (nudged_best,) = sample(
        logits, [replace(chunk, sampling=replace(chunk.sampling, logit_bias=bias))]
    )
    return nudged_best.token_id != best.token_id


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_a_near_tie_explains_another_token(temperature: float) -> None:
    tie = Logits(torch.tensor([[2.0, 2.00001, -9.0]]))
    clear = Logits(torch.tensor([[2.0, 2.001, -9.0]]))
    sampling = SamplingParams(temperature=temperature)
    border = float(torch.tensor([2.0, 2.00001, -9.0], dtype=torch.float64).softmax(0)[0])
    assert is_near_tie(tie, Chunk(0, [1], 0, (), sampling=sampling, uniform=border + 1e-7))
    assert not is_near_tie(clear, Chunk(0, [1], 0, (), sampling=sampling, uniform=border + 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["module", "torch", "native"])
def test_prompt_lookup_gives_the_same_tokens_in_a_thousand_requests(
    kernels: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    states = native_library().states()
    if kernels == "native":
        kernels = next(name for name in reversed(KERNELS) if states[name] == "available")
    num_requests, count = (1000, 40) if kernels in KERNELS else (120, 40)
    model = tiny_model("llama")
    options: dict[str, Any] = {"kernels": kernels, "num_blocks": 450, "max_running": 48}
    off, on = serving(model, **options), serving(model, **options, speculate=True)
    prefixes = many_prefixes(off, model, tmp_path)
    on.prefixes = off.prefixes
    speculate_often(on)
    preempt_often(on)
    # Beginnings are common, so that blocks are shared, and prompts repeat themselves.
    texts = [
        [*text[: 1 + i % 20], *texts_of_one(i)] for i, text in enumerate(prompts(num_requests))
    ]
    requests = requests_of(texts, prefixes, count=count, n=2)
    found, expected = answers(on, requests), answers(off, requests)
    differences = check_equal(off, requests, found, expected)
    num_tokens = sum(len(answer.tokens) for answer in expected)
    assert len(differences) <= num_tokens / 10_000, differences
    stats = on.stats()
    assert stats.generated_tokens == sum(len(answer.tokens) for answer in found)
    assert stats.accepted_tokens > num_tokens / 20
    assert stats.draft_tokens > stats.accepted_tokens
    assert stats.preemptions > 10
    assert stats.kv_reused_tokens > 0
    assert off.stats().draft_tokens == 0


def texts_of_one(number: int) -> list[int]:
    """A text of a few tokens, and again."""
    text = [3 + (number * 7 + i * 5) % 50 for i in range(6)]
    return text * (1 + number % 3)
