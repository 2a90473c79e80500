"""More prefixes than fit: which requests run, which wait, which prefixes leave and return."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.prefix_source import CORRUPT_PREFIX, STORAGE_UNAVAILABLE
from prefixd.server.engine.preloads import Preloads, preloads_full
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
from prefixd.server.engine.step import Step
from prefixd.server.testing import FakeRunner, FakeStaged


def prefix(tenant: str, name: str, length: int = 8) -> PrefixHandle:
    return PrefixHandle(PrefixKey(tenant, f"{name}-{length}"), length)


class Simulation:
    """A scheduler whose steps take a tenth of a second and whose fetches take none."""

    def __init__(self, **config: object) -> None:
        sizes = {"num_blocks": 65, "block_size": 4, "max_running": 4, "max_prefix_wait_s": 1.0}
        self.scheduler = Scheduler(SchedulerConfig(**{**sizes, **config}))  # type: ignore[arg-type]
        self.runner = FakeRunner(block_size=4)
        self.now = 0.0
        self.ids = itertools.count()
        self.served: Counter[str] = Counter()
        self.steps: list[Step] = []
        self.failed: list[Sequence] = []

    def add_request(
        self,
        handle: PrefixHandle | None = None,
        *,
        prompt: int = 2,
        tokens: int = 4,
        tenant: str = "base",
    ) -> Sequence:
        request = AdmittedRequest(
            request_id=str(next(self.ids)),
            tenant=handle.key.tenant if handle else tenant,
            prompt=(1,) * prompt,
            prefix=handle,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(max_tokens=tokens),
            kv_reuse=False,
        )
        sequence = Sequence(next(self.ids), request, 0, 0, list(request.prompt))
        self.failed += self.scheduler.add(sequence, now=self.now)
        return sequence

    def step(self) -> Step:
        self.now += 0.1
        step = self.scheduler.schedule(now=self.now)
        self.steps.append(step)
        for sequence in self.scheduler.update(step, self.runner.run(step)):
            handle = sequence.prefix
            self.served[handle.key.digest if handle else "base"] += 1
        for key in step.fetches:
            length = int(key.digest.split("-")[1])
            self.failed += self.scheduler.prefix_staged(key, FakeStaged(length), now=self.now)
        self.scheduler.check_integrity()
        return step

    def steps_with(self, *handles: PrefixHandle | None, waiting: int = 3) -> Iterator[int]:
        """Steps; before each, ``waiting`` requests for each of ``handles`` wait."""
        for number in range(200):
            for handle in handles:
                tenant = handle.key.tenant if handle else "base"
                lacking = waiting - len(self.scheduler.waiting.of(tenant))
                for _ in range(lacking):
                    self.add_request(handle)
            self.step()
            yield number

    def resident(self) -> set[str]:
        residency = self.scheduler.memory.residency
        return {entry.key.digest for entry in residency if entry.is_compiled}


HOT, COLD = prefix("crowd", "hot"), prefix("lone", "cold")


def test_requests_for_a_resident_prefix_run_until_another_is_overdue() -> None:
    sim = Simulation(max_resident_tokens=8)
    for number in sim.steps_with(HOT):
        if number == 3:
            cold = sim.add_request(COLD)
            requested_at, before = sim.now, sim.served["hot-8"]
        if number > 3 and cold.finished:
            break
    assert cold.reason is FinishReason.LENGTH
    assert sim.served["hot-8"] - before > 4, "no request for the resident prefix ran meanwhile"
    assert cold.started is not None
    assert 1.0 < cold.started - requested_at < 3.0, "it started at once, or far too late"
    assert sim.scheduler.prefix_loader.num_swaps == 1


def test_leaving_prefix_stays_when_the_forced_one_loses_its_last_waiter() -> None:
    sim = Simulation(max_resident_tokens=8)
    for number in sim.steps_with(HOT):
        if number == 3:
            cold = sim.add_request(COLD)
        if sim.scheduler.prefix_loader.forcing is not None:
            sim.scheduler.end(cold, End(FinishReason.ABORT))
            break
    before = sim.served["hot-8"]
    for _ in zip(range(20), sim.steps_with(HOT), strict=False):
        pass
    assert sim.served["hot-8"] > before + 4
    assert sim.scheduler.prefix_loader.num_swaps == 0
    assert sim.scheduler.memory.residency.num_compiles == 1


def test_two_prefixes_that_do_not_fit_together_alternate_and_are_each_used() -> None:
    sim = Simulation(max_resident_tokens=8, max_prefix_wait_s=0.0)
    for _ in sim.steps_with(HOT, COLD):
        pass
    assert min(sim.served["hot-8"], sim.served["cold-8"]) > 15
    compiles = sim.scheduler.memory.residency.num_compiles
    assert compiles <= sim.served.total()
    used = {chunk.prefix for step in sim.steps for chunk in step.chunks}
    assert used == {HOT.key, COLD.key}


def test_large_prefix_loads_though_small_requests_keep_arriving() -> None:
    """No prefix can leave for it: the pool is full of sequences without a prefix, which end at
    different times, and no two of them hold as many blocks as it needs."""
    sim = Simulation(num_blocks=25, max_running=16, max_prefix_wait_s=0.2)
    lengths = itertools.cycle([8, 11, 9, 13])
    for number in range(80):
        while len(sim.scheduler.waiting.of("base")) < 6:
            sim.add_request(prompt=14, tokens=next(lengths))
        if number == 5:
            lone = sim.add_request(prefix("lone", "large", 60))
        sim.step()
    assert lone.reason is FinishReason.LENGTH
    assert sim.served["base"] > 10


@pytest.mark.parametrize(("length", "tokens"), [(72, 20), (84, 40), (120, 20)])
def test_large_prefix_is_used_though_small_prefixes_keep_arriving(length: int, tokens: int) -> None:
    sim = Simulation(num_blocks=33, max_running=16, max_prefix_wait_s=0.5)
    names = itertools.count()
    for number in range(150):
        for tenant in "bcd":
            while len(sim.scheduler.waiting.of(tenant)) < 8:
                sim.add_request(prefix(tenant, str(next(names))), tokens=tokens)
        if number == 20:
            lone = sim.add_request(prefix("a", "large", length))
        sim.step()
        if lone_has_ended := number > 20 and lone.finished:
            break
    assert lone_has_ended


def test_preloads_take_no_room_that_the_next_request_needs() -> None:
    sim = Simulation(max_prefill_chunk=32)
    names = itertools.count()
    for number in range(40):
        while len(sim.scheduler.prefix_loader.preloads) < 20:
            warm = prefix("crowd", str(next(names)), 60)
            sim.scheduler.prefix_loader.preloads.add(warm, cap=None, now=sim.now)
        if number == 10:
            large = sim.add_request(prompt=200)
        sim.step()
    assert large.reason is FinishReason.LENGTH
    assert sim.scheduler.memory.residency.num_compiles > 10


def test_promised_room_blocks_no_request_when_nothing_runs() -> None:
    """A large prefix lacked blocks of another prefix that was not used yet, and whose request was
    queued behind one that had to leave room for the large prefix."""
    sim = Simulation(num_blocks=6, max_running=2, max_prefix_wait_s=0.0)
    sequences = [sim.add_request(prefix("a", "x", 8), prompt=1)]
    sequences.append(sim.add_request(prefix("b", "x", 13), prompt=1, tokens=1))
    for _ in range(2):
        sim.step()
    sequences.append(sim.add_request(prompt=8, tokens=1, tenant="b"))
    for _ in range(2):
        sim.step()
    sequences.append(sim.add_request(prompt=3, tenant="c"))
    for _ in range(60):
        sim.step()
    assert [sequence.reason for sequence in sequences] == [FinishReason.LENGTH] * 4


def test_first_of_two_large_prefixes_is_used_before_the_second_loads() -> None:
    sim = Simulation(num_blocks=17, max_running=16, max_prefix_wait_s=0.0)
    first, second = prefix("one", "first", 40), prefix("two", "second", 40)
    for _ in zip(range(120), sim.steps_with(first, second, None, waiting=2), strict=False):
        pass
    assert min(sim.served[name] for name in ("first-40", "second-40", "base")) > 3


def test_prefixes_beyond_the_lookahead_do_not_block_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefixd.server.engine.step_builder.LOOKAHEAD", 3)
    sim = Simulation(max_staged=2, max_resident_tokens=16)
    sequences = [sim.add_request(prefix(tenant, name)) for tenant in "abcdef" for name in "xyz"]
    for _ in range(200):
        sim.step()
    assert all(sequence.reason is FinishReason.LENGTH for sequence in sequences)


def test_least_recently_used_prefix_is_evicted_first() -> None:
    sim = Simulation(max_resident_tokens=24)
    names = [prefix("t", name) for name in ("a", "b", "c", "d")]
    for handle in (*names[:3], names[0], names[3]):
        sim.add_request(handle, tokens=1)
        for _ in range(5):
            sim.step()
    assert sim.resident() == {"a-8", "c-8", "d-8"}


def test_pinned_prefix_stays_unless_a_request_can_never_run_next_to_it() -> None:
    sim = Simulation(max_resident_tokens=24)
    sim.scheduler.prefix_loader.set_pins([prefix("t", "pinned")])
    for _ in range(3):
        sim.step()
    assert sim.resident() == {"pinned-8"}
    for name in "abcdef":
        sim.add_request(prefix("t", name), tokens=1)
        for _ in range(5):
            sim.step()
    assert "pinned-8" in sim.resident()
    large = sim.add_request(prefix("t", "large", 20))
    for _ in range(20):
        sim.step()
    assert large.reason is FinishReason.LENGTH
    sim.add_request(prefix("t", "a"), tokens=1)
    for _ in range(10):
        sim.step()
    assert "pinned-8" in sim.resident(), "a pinned prefix is loaded again"
    sim.scheduler.prefix_loader.set_pins([])
    sim.add_request(prefix("t", "large", 24))
    for _ in range(10):
        sim.step()
    assert "pinned-8" not in sim.resident()


def test_pins_respect_the_cap_of_their_tenant() -> None:
    sim = Simulation()
    pins = [prefix("t", "p"), prefix("t", "q")]
    sim.scheduler.prefix_loader.set_pins(pins, caps={"t": 12})
    for _ in range(10):
        sim.step()
    assert sim.resident() == {"p-8"}
    request = AdmittedRequest(
        "r", "t", (1,), prefix("t", "x"), SamplingParams(), StopParams(2), max_resident_tokens=12
    )
    sequence = Sequence(99, request, 0, 0, [1])
    sim.scheduler.add(sequence, now=sim.now)
    for _ in range(30):
        sim.step()
    assert sequence.reason is FinishReason.LENGTH


def test_last_running_sequence_may_evict_a_pinned_prefix() -> None:
    sim = Simulation(num_blocks=9)
    sim.scheduler.prefix_loader.set_pins([prefix("t", "pinned")])
    for _ in range(3):
        sim.step()
    long = sim.add_request(tokens=30)  # 32 tokens: the whole pool
    for _ in range(40):
        sim.step()
    assert long.reason is FinishReason.LENGTH


def test_evicted_prefix_returns_from_host_memory_without_a_fetch() -> None:
    sim = Simulation(max_resident_tokens=8, host_tokens=16)
    for name in ("a", "b", "a", "b", "c", "d", "a"):
        sim.add_request(prefix("t", name), tokens=1)
        for _ in range(6):
            sim.step()
    fetched = [key.digest for step in sim.steps for key in step.fetches]
    assert fetched == ["a-8", "b-8", "c-8", "d-8", "a-8"], (
        "only prefixes that host memory had dropped"
    )
    assert sim.scheduler.prefix_loader.num_loads == {"store": 5, "host": 2}
    assert sim.scheduler.memory.host.num_tokens <= 16


def test_preload_becomes_resident_and_is_compiled_once() -> None:
    sim = Simulation(max_resident_tokens=16)
    sim.scheduler.prefix_loader.preloads.add(prefix("t", "warm"), cap=None, now=0.0)
    for _ in range(3):
        sim.step()
    assert sim.resident() == {"warm-8"}
    assert not sim.scheduler.prefix_loader.preloads
    assert sim.scheduler.memory.residency.num_compiles == 1


def test_unsatisfiable_preloads_and_pins_block_no_request_and_fetch_nothing() -> None:
    sim = Simulation(max_resident_tokens=16, max_staged=2)
    running = [sim.add_request(prefix("t", name), tokens=40) for name in "ab"]
    for _ in range(4):
        sim.step()
    for name in "wxyz":
        sim.scheduler.prefix_loader.preloads.add(prefix("t", name), cap=None, now=sim.now)
    sim.scheduler.prefix_loader.set_pins([prefix("t", "pin")], caps={"t": 4})
    for _ in range(4):
        sim.step()
    assert {key.digest for step in sim.steps for key in step.fetches} == {"a-8", "b-8"}
    # Staged ones that lost their room are dropped for those that requests need.
    for sequence in running:
        sim.scheduler.end(sequence, End(FinishReason.ABORT))
    step = sim.scheduler.schedule(now=sim.now)
    assert {key.digest for key in step.fetches} == {"w-8", "x-8"}
    sim.scheduler.update(step, sim.runner.run(step))
    for name in "cd":
        sim.add_request(prefix("t", name), tokens=1)
    for key in step.fetches:
        sim.scheduler.prefix_staged(key, FakeStaged(8), now=sim.now)
    for _ in range(8):
        sim.step()
    assert sim.served["c-8"] == sim.served["d-8"] == 1


def test_preloads_without_room_do_not_delay_another_tenants_preload() -> None:
    sim = Simulation(max_staged=2)
    for number in range(20):
        sim.scheduler.prefix_loader.preloads.add(prefix("full", f"w{number}"), cap=4, now=sim.now)
    sim.scheduler.prefix_loader.preloads.add(prefix("other", "mine"), cap=None, now=sim.now)
    for _ in range(15):
        sim.step()
    assert sim.resident() == {"mine-8"}


def test_many_preloads_of_one_tenant_leave_places_for_other_tenants() -> None:
    preloads = Preloads(limit=4)
    for name in "abcd":
        assert not preloads_full(preloads.by_tenant(), "crowd", limit=4)
        preloads.add(prefix("crowd", name), cap=None, now=0.0)
    assert preloads_full(preloads.by_tenant(), "crowd", limit=4)
    preloads.add(
        prefix("crowd", "e"), cap=None, now=0.0
    )  # added by a thread that checked at the same time
    assert [warm.handle for warm in preloads] == [prefix("crowd", name) for name in "bcde"]
    for name in "xy":
        assert not preloads_full(preloads.by_tenant(), "other", limit=4)
        preloads.add(prefix("other", name), cap=None, now=0.0)
    assert [warm.handle.key.tenant for warm in preloads] == ["crowd", "crowd", "other", "other"]
    assert preloads_full(preloads.by_tenant(), "other", limit=4)
    assert not preloads_full(preloads.by_tenant(), "third", limit=4)
    preloads.add(prefix("other", "x"), cap=7, now=0.0)  # renewed: takes no other place
    assert len(preloads) == 4


def test_pinned_prefix_that_failed_to_load_is_not_fetched_at_once() -> None:
    sim = Simulation(failed_prefix_memory_s=5.0)
    gone = prefix("t", "gone")
    sim.scheduler.prefix_loader.set_pins([gone])
    fetches = 0
    for _ in range(100):
        sim.now += 0.1
        for key in sim.scheduler.schedule(now=sim.now).fetches:
            fetches += 1
            sim.scheduler.prefix_failed(key, "gone", now=sim.now)
    assert fetches == 2


def test_retired_prefix_leaves_when_its_last_sequence_ends() -> None:
    sim = Simulation(host_tokens=100)
    running = sim.add_request(prefix("t", "old"), tokens=6)
    for _ in range(3):
        sim.step()
    sim.scheduler.prefix_loader.retire([prefix("t", "old").key])
    sim.step()
    assert sim.resident() == {"old-8"}
    while not running.finished:
        sim.step()
    sim.step()
    assert sim.resident() == set()
    assert len(sim.scheduler.memory.host) == 0
    # After a new request it is loaded again, and stays.
    sim.add_request(prefix("t", "old"), tokens=1)
    for _ in range(5):
        sim.step()
    assert sim.resident() == {"old-8"}


def test_request_for_a_prefix_that_recently_failed_fails_at_once() -> None:
    sim = Simulation(failed_prefix_memory_s=5.0)
    gone = prefix("t", "gone")
    sim.add_request(gone)
    step = sim.scheduler.schedule(now=sim.now)
    assert step.fetches == [gone.key]
    assert len(sim.scheduler.prefix_failed(gone.key, "gone", now=sim.now)) == 1
    sim.now += 4.9
    at_once = sim.add_request(gone)
    assert at_once.end == End(FinishReason.ERROR, error="gone")
    sim.now += 0.2
    sim.add_request(gone, tokens=1)
    for _ in range(5):
        sim.step()
    assert sim.served["gone-8"] == 1


@pytest.mark.parametrize("code", [STORAGE_UNAVAILABLE, CORRUPT_PREFIX])
def test_failure_that_may_end_soon_is_remembered_for_a_second(code: str) -> None:
    sim = Simulation(failed_prefix_memory_s=5.0)
    handle = prefix("t", "away")
    sim.scheduler.prefix_failed(handle.key, "away", code=code, now=sim.now)
    sim.now += 0.9
    assert sim.add_request(handle).end is not None
    sim.now += 0.2
    sim.add_request(handle)
    assert sim.scheduler.schedule(now=sim.now).fetches == [handle.key]


def test_compiles_of_a_step_share_one_chunk_and_decodes_continue() -> None:
    sim = Simulation(max_prefill_chunk=6, max_tokens_per_step=64, num_blocks=200)
    streams = [sim.add_request(tokens=60) for _ in range(3)]
    sim.step()
    for name in "abc":
        sim.add_request(prefix("t", name, 20))
    for _ in range(14):
        step = sim.step()
        assert sum(part.stop - part.start for part in step.compiles) <= 6
        assert {s.seq_id for s in streams} <= {chunk.seq_id for chunk in step.chunks}
    assert sim.resident() == {"a-20", "b-20", "c-20"}


def test_tenant_earns_no_credit_while_its_prefix_is_loading() -> None:
    """Its turn came and could not be used: afterwards it gets its share."""
    sim = Simulation(max_running=1)
    slow = prefix("slow", "slow")
    key = slow.key
    for _ in range(40):
        sim.add_request(slow, tokens=1)
    fetching = sim.scheduler.schedule(now=sim.now)
    assert fetching.fetches == [key]
    for _ in range(120):
        if len(sim.scheduler.waiting.of("base")) < 3:
            sim.add_request(tokens=1)
        sim.step()
    assert sim.served == {"base": 120}
    sim.scheduler.prefix_staged(key, FakeStaged(8), now=sim.now)
    for _ in range(30):
        if len(sim.scheduler.waiting.of("base")) < 3:
            sim.add_request(tokens=1)
        sim.step()
    assert sim.served["base"] - 120 > 15
    assert sim.served["slow-8"] > 3
