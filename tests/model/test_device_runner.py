"""A runner one step ahead gives the tokens of one that waits: on a CPU, with the same code."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch

from prefixd.server.engine.constraint import bit_mask
from prefixd.server.engine.request import PrefixKey, SamplingParams
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import PENDING, Chunk, CompileChunk, Step
from prefixd.server.model import device_runner
from prefixd.server.model.buffers import NO_STEP, StepSizes
from prefixd.server.model.decoders import make_decoder
from prefixd.server.model.device_runner import DeviceRunner
from prefixd.server.model.device_sampler import DeviceSampler
from prefixd.server.model.paged_module import PagedModuleDecoder
from prefixd.server.model.prefix import HardPrompt
from prefixd.server.model.runner import Runner
from tests.model.fake_graph import DEVICE, FakeGraph
from tests.model.test_decoders import POOL, base_of
from tests.model.test_graphs import SIZES, make, prompt

SETTINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0, repetition_penalty=1.3),
]
STEPS = 6


def chunk(number: int, tokens: list[int], step: int, *, pending: bool = False) -> Chunk:
    """Sequence ``number`` in step ``step``: its prompt, then one token a step."""
    params, length = SETTINGS[number], len(prompt(number))
    start = 0 if step == 0 else length + step - 1
    new = [PENDING] if pending else tokens[start:]
    banned = (3, 4, tokens[-1]) if number == 0 and step == 3 and not pending else ()
    return Chunk(
        number, new, start, (3 * number + 1, 3 * number + 2, 3 * number + 3), sampling=params,
        uniform=(0.37 * (step + 1)) % 1, history=tuple(tokens) if params.needs_history else (),
        num_prompt_tokens=length, banned=banned,
    )  # fmt: skip


def without(*token_ids: int) -> bytes:
    """The bit mask without these."""
    return bit_mask(set(range(500)) - set(token_ids), num_ids=500)


def expected(folder: Path) -> dict[int, list[int]]:
    runner = Runner(make(folder, captured=None))
    texts = {number: list(prompt(number)) for number in range(3)}
    for step in range(STEPS):
        chunks = [chunk(number, texts[number], step) for number in texts]
        for number, (token,) in runner.run(Step(chunks=chunks)).sampled.items():
            texts[number].append(token.token_id)
    return texts


@pytest.mark.parametrize("sizes", [SIZES, NO_STEP], ids=["sized", "growing"])
@pytest.mark.parametrize("captured", [None, 8])
def test_a_step_submitted_before_its_tokens_came_gives_the_same_tokens(
    captured: int | None, sizes: StepSizes, tmp_path: Path
) -> None:
    """Also with a mask that comes while the pass runs."""
    FakeGraph.replays = 0
    runner = DeviceRunner(make(tmp_path, captured=captured, sizes=sizes), max_rows=8)
    texts = {number: list(prompt(number)) for number in range(3)}
    for step in range(STEPS):
        chunks = [chunk(n, texts[n], step, pending=step > 0) for n in texts]
        masked = [0] if step == 3 else []
        runner.submit(Step(chunks=chunks, masked=masked))
        if step:
            collect(runner, texts)
        if masked:
            runner.complete(lambda: {0: without(3, 4, texts[0][-1])})
    collect(runner, texts)
    assert texts == expected(tmp_path)
    assert FakeGraph.replays == (STEPS - 1 if captured else 0)


def test_layers_of_the_module_read_pending_tokens_too(tmp_path: Path) -> None:
    decoder = make_decoder(base_of(device=DEVICE), "paged_module", **POOL, data_folder=tmp_path)
    assert isinstance(decoder, PagedModuleDecoder)
    runner = DeviceRunner(decoder, max_rows=8)
    texts = {number: list(prompt(number)) for number in range(3)}
    for step in range(STEPS):
        masked = [0] if step == 3 else []
        chunks = [chunk(n, texts[n], step, pending=step > 0) for n in texts]
        runner.submit(Step(chunks=chunks, masked=masked))
        if step:
            collect(runner, texts)
        if masked:
            runner.complete(lambda: {0: without(3, 4, texts[0][-1])})
    collect(runner, texts)
    assert texts == expected(tmp_path)


def test_positions_that_were_not_written_are_never_read(tmp_path: Path) -> None:
    """Blocks are not zeroed, and may hold anything."""
    decoder = make(tmp_path, captured=None)
    with torch.inference_mode():
        decoder.cache.pool.fill_(float("nan"))
    runner = DeviceRunner(decoder, max_rows=8)
    texts = {number: list(prompt(number)) for number in range(3)}
    runner.submit(Step(chunks=[chunk(n, texts[n], 0) for n in texts], fresh=list(range(1, 10))))
    collect(runner, texts)
    runner.submit(Step(chunks=[chunk(n, texts[n], 1) for n in texts]))
    collect(runner, texts)
    assert texts == {n: tokens[: len(texts[n])] for n, tokens in expected(tmp_path).items()}


def test_a_mask_that_fails_is_a_failure_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = DeviceRunner(make(tmp_path, captured=None), max_rows=8)
    texts = {number: list(prompt(number)) for number in range(3)}
    runner.submit(Step(chunks=[chunk(n, texts[n], 0) for n in texts], masked=[1]))
    error = RuntimeError("CUDA error: out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(DeviceSampler, "run", Mock(side_effect=error))
        runner.complete(lambda: {1: without()})
    with pytest.raises(OutOfMemory):
        runner.collect()
    runner.submit(Step(chunks=[chunk(n, texts[n], 0) for n in texts]))
    assert set(runner.collect().sampled) == {0, 1, 2}


def test_a_pending_row_with_a_mask_keeps_its_counts_while_others_begin(tmp_path: Path) -> None:
    """Its token is counted by the step in flight alone. It is sampled after the others."""
    runner = DeviceRunner(make(tmp_path, captured=None), max_rows=3)
    chunks = [
        Chunk(
            number, [11, 12, 13], 0, (number + 1,), sampling=SETTINGS[2], history=(11, 12, 13),
            num_prompt_tokens=3,
        )
        for number in range(5)
    ]  # fmt: skip
    runner.submit(Step(chunks=chunks[:1]))
    runner.collect()
    runner.submit(Step(chunks=chunks[1:3], masked=[1, 2]))
    runner.complete(lambda: {1: without(), 2: without()})
    pending = replace(chunks[1], tokens=[PENDING], start=3)
    runner.submit(Step(chunks=[*chunks[3:], pending], masked=[1]))
    assert set(runner.collect().sampled) == {1, 2}
    runner.complete(lambda: {1: without()})
    assert set(runner.collect().sampled) == {1, 3, 4}


def test_a_step_without_samples_is_waited_for_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is measured, and a failure of it would be reported for another step."""
    events: list[Mock] = []

    def new_event(_: torch.device) -> Mock:
        events.append(Mock())
        return events[-1]

    monkeypatch.setattr(device_runner, "new_event", new_event, raising=False)
    runner = DeviceRunner(make(tmp_path, captured=None), max_rows=8)
    prefill = replace(chunk(1, prompt(1), 0), sampling=None)
    prefix = CompileChunk(PrefixKey("t", "digest"), HardPrompt((5, 6, 7)), 0, 3, (20,))
    for step in (Step(chunks=[prefill]), Step(compiles=[prefix])):
        runner.submit(step)
        assert events[-1].mock_calls == [call.record()]
        assert not runner.collect().sampled
        assert events[-1].mock_calls == [call.record(), call.synchronize()]
    assert len(events) == 2


def collect(runner: DeviceRunner, texts: dict[int, list[int]]) -> None:
    for number, (token,) in runner.collect().sampled.items():
        assert token.finite
        texts[number].append(token.token_id)
