"""How much smaller steps become after out-of-memory: by what the failed step contained."""

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.recovery import OomBackoff
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import Chunk, CompileChunk, Save, Step
from prefixd.server.testing import FakeStaged

KEY = PrefixKey("t", "digest")
SAVES = [Save(KEY, 8, (1, 2))]
CONFIG = SchedulerConfig(num_blocks=64, block_size=4, max_running=64, max_prefill_chunk=512)


def chunks(*sizes: int) -> list[Chunk]:
    return [Chunk(i, [0] * size, 0, []) for i, size in enumerate(sizes)]


def compiles(*sizes: int) -> list[CompileChunk]:
    return [CompileChunk(KEY, FakeStaged(size), 0, size, []) for size in sizes]


@pytest.mark.parametrize(
    ("step", "limits", "retries"),
    [
        (Step(chunks=chunks(*[1] * 16)), (8, 512), True),  # decodes alone say nothing about chunks
        (Step(chunks=chunks(100, *[1] * 15)), (8, 50), True),
        (
            Step(chunks=chunks(100)),
            (64, 50),
            True,
        ),  # one row says nothing about their number
        (Step(chunks=chunks(1)), (64, 512), False),
        (Step(chunks=chunks(1), saves=SAVES), (64, 512), True),  # it may have been the save
        (Step(saves=SAVES), (64, 512), True),
        (Step(compiles=compiles(100)), (64, 50), True),
        (Step(compiles=compiles(30, 30)), (64, 30), True),
        (Step(compiles=compiles(1)), (64, 512), False),
        (Step(chunks=chunks(1, 1, 1), compiles=compiles(60)), (1, 30), True),
        (Step(chunks=chunks(1), compiles=compiles(1)), (64, 512), False),
    ],
)
def test_out_of_memory_halves_what_the_step_had_several_of(
    step: Step, limits: tuple[int, int], *, retries: bool
) -> None:
    backoff = OomBackoff(CONFIG)
    assert backoff.shrink(step) == retries
    assert (backoff.max_running, backoff.max_chunk) == limits


@pytest.mark.parametrize("compiled", [(200,), (1, 1)])
def test_repeated_out_of_memory_reaches_the_smallest_step(compiled: tuple[int, ...]) -> None:
    backoff, failures = OomBackoff(CONFIG), 1
    step = Step(chunks=chunks(300, *[1] * 40), compiles=compiles(*compiled))
    while backoff.shrink(step):
        failures += 1
        assert failures < 20
        sizes = [min(300, backoff.max_chunk), *[1] * 40]
        step = Step(
            chunks=chunks(*sizes[: backoff.max_running]),
            compiles=compiles(min(sum(compiled), backoff.max_chunk)),
        )


def test_limits_grow_back_after_32_good_steps() -> None:
    backoff = OomBackoff(CONFIG)
    backoff.shrink(Step(chunks=chunks(*[1] * 64)))
    for _ in range(31):
        backoff.step_succeeded()
    assert backoff.max_running == 32
    backoff.step_succeeded()
    assert backoff.max_running == 64
