"""Single decisions of the scheduler, spelled out; the state machine covers the rest."""

import gc
import itertools
from dataclasses import replace

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
from prefixd.server.engine.sequence import End, Sequence
from prefixd.server.engine.stats import debug_state
from prefixd.server.testing import FakeRunner, FakeStaged

_ids = itertools.count()


def sequence(prefix: PrefixHandle, *, cap: int | None = None, max_tokens: int = 40) -> Sequence:
    request = AdmittedRequest(
        request_id=str(next(_ids)),
        tenant=prefix.key.tenant,
        prompt=(1, 2),
        prefix=prefix,
        sampling=SamplingParams(temperature=0),
        stop=StopParams(max_tokens=max_tokens),
        max_resident_tokens=cap,
    )
    return Sequence(next(_ids), request, 0, 0, [1, 2])


def step(scheduler: Scheduler, runner: FakeRunner) -> None:
    """One step, every fetch answered at once."""
    planned = scheduler.schedule()
    if planned.has_work:
        scheduler.update(planned, runner.run(planned))
    for key in planned.fetches:
        scheduler.prefix_staged(key, FakeStaged(int(key.digest.split("-")[1])))


def prefix(tenant: str, name: str, length: int) -> PrefixHandle:
    return PrefixHandle(PrefixKey(tenant, f"{name}-{length}"), length)


def resident(scheduler: Scheduler) -> set[str]:
    entries = scheduler.memory.residency
    return {entry.key.digest for entry in entries if entry.is_compiled}


def test_tenant_at_its_cap_waits_until_its_own_prefix_is_idle() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4))
    runner = FakeRunner(block_size=4)
    first, second = prefix("a", "first", 8), prefix("a", "second", 8)
    other = prefix("b", "other", 8)
    scheduler.add(sequence(first, cap=10))
    scheduler.add(sequence(second, cap=10, max_tokens=3))
    scheduler.add(sequence(other))
    for _ in range(8):
        step(scheduler, runner)
    assert resident(scheduler) == {"first-8", "other-8"}
    while any(s.prefix == first for s in scheduler.running):
        assert scheduler.memory.residency.tokens_of("a") <= 10
        step(scheduler, runner)
    for _ in range(3):
        step(scheduler, runner)
    assert resident(scheduler) == {"second-8", "other-8"}
    assert scheduler.memory.residency.num_evictions == 1


def test_two_prefixes_are_resident_without_a_cap() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4))
    runner = FakeRunner(block_size=4)
    for name in ("first", "second"):
        scheduler.add(sequence(prefix("a", name, 8)))
    for _ in range(8):
        step(scheduler, runner)
    assert resident(scheduler) == {"first-8", "second-8"}


def test_prefix_placed_by_a_failed_step_is_placed_again() -> None:
    """Its blocks may not have been zeroed: they go back, and the next step zeroes them again."""
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4))
    scheduler.add(sequence(prefix("a", "first", 8)))
    step(scheduler, FakeRunner(block_size=4))
    failing = scheduler.schedule()
    assert failing.fresh
    assert failing.compiles
    assert scheduler.step_failed(failing, "no room", out_of_memory=True) == []
    again = scheduler.schedule()
    assert set(again.fresh) == set(failing.fresh)
    assert again.compiles[0].start == 0
    scheduler.check_integrity()


def test_finished_sequences_are_not_kept_until_their_deadline() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=9, max_queue_wait_s=60.0))
    before = num_sequences()
    patient = Sequence(next(_ids), bare(timeout_s=1e9), 0, 0, [1])
    scheduler.add(patient)
    for _ in range(5000):
        brief = Sequence(next(_ids), bare(timeout_s=1e8), 0, 0, [1])
        scheduler.add(brief)
        scheduler.end(brief, End(FinishReason.ABORT))
    assert num_sequences() - before < 1000
    assert scheduler.deadlines.next_at == 60.0
    assert scheduler.expire(now=61.0) == [patient]


def test_debug_state_shows_how_much_of_a_prefix_is_compiled() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_prefill_chunk=6))
    scheduler.add(sequence(prefix("a", "first", 8)))
    seen = []
    runner = FakeRunner(block_size=4)
    for _ in range(4):
        step(scheduler, runner)
        (entry,) = debug_state(scheduler, now=0.0)["prefixes"]["entries"]
        seen.append((entry["tier"], entry["compiled"]))
    assert seen == [("staged", 0), ("compiling", 6), ("resident", 8), ("resident", 8)]
    scheduler.add(sequence(prefix("a", "second", 8)))
    scheduler.schedule()
    (_, entry) = debug_state(scheduler, now=0.0)["prefixes"]["entries"]
    assert (entry["tier"], entry["compiled"]) == ("fetching", 0)


def num_sequences() -> int:
    gc.collect()
    return sum(type(thing) is Sequence for thing in gc.get_objects())


def bare(*, timeout_s: float) -> AdmittedRequest:
    return AdmittedRequest(
        "r", "t", (1,), None, SamplingParams(), StopParams(max_tokens=4), timeout_s=timeout_s
    )


def test_out_of_memory_makes_no_suspects_and_another_error_does() -> None:
    for out_of_memory in (True, False):
        scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4))
        sequences = [Sequence(next(_ids), bare(timeout_s=1e9), 0, 0, [1]) for _ in range(2)]
        for waiting in sequences:
            scheduler.add(waiting)
        scheduler.step_failed(scheduler.schedule(), "failed", out_of_memory=out_of_memory)
        assert scheduler.recovery.proving is not out_of_memory
        assert list(scheduler.recovery.suspects) == ([] if out_of_memory else sequences)
        assert len(scheduler.schedule().chunks) == 1  # halved, or one suspect alone


def test_only_a_token_that_is_drawn_takes_a_random_number() -> None:
    drawn = []

    def uniform(seed: int, index: int) -> float:
        drawn.append((seed, index))
        return 0.5

    for temperature in (0.0, 0.7):
        request = replace(bare(timeout_s=60), sampling=SamplingParams(temperature=temperature))
        scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4), uniform=uniform)
        scheduler.add(Sequence(next(_ids), request, 0, 9, [1]))
        (chunk,) = scheduler.schedule().chunks
        assert chunk.uniform == (0.5 if temperature else 0.0)
    assert drawn == [(9, 0)]
