"""A prefix with fewer tokens than its manifest said when the request was admitted."""

import itertools

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.testing import FakeRunner, FakeStaged, fake_generate

KEY = PrefixKey("t", "voice")
BLOCK = 4


def run(scheduler: Scheduler, runner: FakeRunner, number: int, *, said: int, has: int) -> Sequence:
    """One request whose handle says ``said`` tokens, of a prefix that has ``has``."""
    prompt = (7, 8, 9, 10, 11)
    request = AdmittedRequest(
        request_id=str(number),
        tenant="t",
        prompt=prompt,
        prefix=PrefixHandle(KEY, said),
        sampling=SamplingParams(temperature=0),
        stop=StopParams(max_tokens=3),
    )
    sequence = Sequence(number, request, 0, 0, list(prompt))
    scheduler.add(sequence)
    for _ in range(20):
        if sequence.finished:
            break
        step = scheduler.schedule()
        scheduler.update(step, runner.run(step))
        for key in step.fetches:
            scheduler.prefix_staged(key, FakeStaged(has))
        scheduler.check_integrity()
    return sequence


@pytest.mark.parametrize(("said", "has"), [(8, 7), (9, 8), (6, 5), (5, 4)])
def test_the_number_of_tokens_that_was_loaded_counts(said: int, has: int) -> None:
    """Positions, blocks and the resident tokens follow the payload, for the request that loaded it
    and for one that was admitted before the correction and starts later."""
    config = SchedulerConfig(num_blocks=33, block_size=BLOCK)
    scheduler, runner, numbers = Scheduler(config), FakeRunner(block_size=BLOCK), itertools.count()
    for expected in (said, said, has):
        sequence = run(scheduler, runner, next(numbers), said=expected, has=has)
        assert sequence.reason is FinishReason.LENGTH
        assert sequence.tokens[5:] == fake_generate(KEY.digest, (7, 8, 9, 10, 11), 3)
        assert scheduler.memory.residency.num_tokens == has
        assert scheduler.memory.residency.num_blocks == -(-has // BLOCK)


def test_a_prefix_with_more_tokens_than_admitted_is_refused() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=33, block_size=BLOCK))
    sequence = run(scheduler, FakeRunner(block_size=BLOCK), 0, said=7, has=8)
    assert sequence.reason is FinishReason.ERROR
    assert sequence.end is not None
    assert sequence.end.error is not None
    assert "8 virtual tokens, its manifest says 7" in sequence.end.error
