"""A runner one step ahead gives the tokens of one that waits: on a CPU, with the same code."""

from pathlib import Path

import pytest

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import PENDING, Chunk, Step
from prefixd.server.model.buffers import NO_STEP, StepSizes
from prefixd.server.model.device_runner import DeviceRunner
from prefixd.server.model.runner import Runner
from tests.model.fake_graph import FakeGraph
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
            runner.complete({0: (3, 4, texts[0][-1])})
    collect(runner, texts)
    assert texts == expected(tmp_path)
    assert FakeGraph.replays == (STEPS - 1 if captured else 0)


def collect(runner: DeviceRunner, texts: dict[int, list[int]]) -> None:
    for number, (token,) in runner.collect().sampled.items():
        assert token.finite
        texts[number].append(token.token_id)
