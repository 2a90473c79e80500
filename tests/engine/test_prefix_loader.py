"""More prefixes than fit: who rides along, who waits, who is swapped out, who comes back."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.prefix_loader import Preloads, preloads_full
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


class World:
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

    def ask(
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

    def steps_with(self, *crowd: PrefixHandle | None, waiting: int = 3) -> Iterator[int]:
        """Steps, before each of which so many requests of each of ``crowd`` wait."""
        for number in range(200):
            for handle in crowd:
                tenant = handle.key.tenant if handle else "base"
                lacking = waiting - len(self.scheduler.waiting.of(tenant))
                for _ in range(lacking):
                    self.ask(handle)
            self.step()
            yield number

    def resident(self) -> set[str]:
        residency = self.scheduler.memory.residency
        return {entry.key.digest for entry in residency if entry.is_compiled}


HOT, COLD = prefix("crowd", "hot"), prefix("lone", "cold")


def test_requests_for_what_is_there_ride_along_until_the_wait_is_over() -> None:
    world = World(max_resident_tokens=8)
    for number in world.steps_with(HOT):
        if number == 3:
            cold = world.ask(COLD)
            asked, before = world.now, world.served["hot-8"]
        if number > 3 and cold.finished:
            break
    assert cold.reason is FinishReason.LENGTH
    assert world.served["hot-8"] - before > 4, "nobody rode along"
    assert cold.started is not None
    assert 1.0 < cold.started - asked < 3.0, "it came at once, or far too late"
    assert world.scheduler.prefix_loader.num_swaps == 1


def test_a_forced_prefix_that_nobody_wants_any_more_lets_the_others_stay() -> None:
    world = World(max_resident_tokens=8)
    for number in world.steps_with(HOT):
        if number == 3:
            cold = world.ask(COLD)
        if world.scheduler.prefix_loader.forcing is not None:
            world.scheduler.end(cold, End(FinishReason.ABORT))
            break
    before = world.served["hot-8"]
    for _ in zip(range(20), world.steps_with(HOT), strict=False):
        pass
    assert world.served["hot-8"] > before + 4
    assert world.scheduler.prefix_loader.num_swaps == 0
    assert world.scheduler.memory.residency.num_compiles == 1


def test_two_that_exclude_each_other_alternate_and_each_is_used_when_it_comes() -> None:
    world = World(max_resident_tokens=8, max_prefix_wait_s=0.0)
    for _ in world.steps_with(HOT, COLD):
        pass
    assert min(world.served["hot-8"], world.served["cold-8"]) > 15
    compiles = world.scheduler.memory.residency.num_compiles
    assert compiles <= world.served.total()
    used = {chunk.prefix for step in world.steps for chunk in step.chunks}
    assert used == {HOT.key, COLD.key}


def test_room_for_a_large_prefix_is_kept_from_small_requests_that_keep_coming() -> None:
    """Nothing can leave for it: the pool is full of sequences under no prefix, which end at
    different times, and no two of them hold as much as it needs."""
    world = World(num_blocks=25, max_running=16, max_prefix_wait_s=0.2)
    lengths = itertools.cycle([8, 11, 9, 13])
    for number in range(80):
        while len(world.scheduler.waiting.of("base")) < 6:
            world.ask(prompt=14, tokens=next(lengths))
        if number == 5:
            lone = world.ask(prefix("lone", "large", 60))
        world.step()
    assert lone.reason is FinishReason.LENGTH
    assert world.served["base"] > 10


@pytest.mark.parametrize(("length", "tokens"), [(72, 20), (84, 40), (120, 20)])
def test_a_large_prefix_gets_its_room_and_its_use_from_small_ones_that_keep_coming(
    length: int, tokens: int
) -> None:
    world = World(num_blocks=33, max_running=16, max_prefix_wait_s=0.5)
    names = itertools.count()
    for number in range(150):
        for tenant in "bcd":
            while len(world.scheduler.waiting.of(tenant)) < 8:
                world.ask(prefix(tenant, str(next(names))), tokens=tokens)
        if number == 20:
            lone = world.ask(prefix("a", "large", length))
        world.step()
        if lone_has_ended := number > 20 and lone.finished:
            break
    assert lone_has_ended


def test_warmed_prefixes_take_no_room_that_the_next_request_waits_for() -> None:
    world = World(max_prefill_chunk=32)
    names = itertools.count()
    for number in range(40):
        while len(world.scheduler.prefix_loader.preloads) < 20:
            warm = prefix("crowd", str(next(names)), 60)
            world.scheduler.prefix_loader.preloads.add(warm, cap=None, now=world.now)
        if number == 10:
            large = world.ask(prompt=200)
        world.step()
    assert large.reason is FinishReason.LENGTH
    assert world.scheduler.memory.residency.num_compiles > 10


def test_room_that_is_kept_stops_nobody_when_nothing_runs_to_make_more() -> None:
    """A large prefix lacked what another held that was not used yet, whose request stood behind one
    that had to leave room for the large one."""
    world = World(num_blocks=6, max_running=2, max_prefix_wait_s=0.0)
    asked = [world.ask(prefix("a", "x", 8), prompt=1)]
    asked.append(world.ask(prefix("b", "x", 13), prompt=1, tokens=1))
    for _ in range(2):
        world.step()
    asked.append(world.ask(prompt=8, tokens=1, tenant="b"))
    for _ in range(2):
        world.step()
    asked.append(world.ask(prompt=3, tenant="c"))
    for _ in range(60):
        world.step()
    assert [sequence.reason for sequence in asked] == [FinishReason.LENGTH] * 4


def test_and_of_two_such_the_first_is_used_before_the_second_takes_its_room() -> None:
    world = World(num_blocks=17, max_running=16, max_prefix_wait_s=0.0)
    first, second = prefix("one", "first", 40), prefix("two", "second", 40)
    for _ in zip(range(120), world.steps_with(first, second, None, waiting=2), strict=False):
        pass
    assert min(world.served[name] for name in ("first-40", "second-40", "base")) > 3


def test_prefixes_of_those_further_back_than_a_step_looks_clog_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefixd.server.engine.step_builder.LOOKAHEAD", 3)
    world = World(max_staged=2, max_resident_tokens=16)
    asked = [world.ask(prefix(tenant, name)) for tenant in "abcdef" for name in "xyz"]
    for _ in range(200):
        world.step()
    assert all(sequence.reason is FinishReason.LENGTH for sequence in asked)


def test_the_least_recently_used_leaves_first() -> None:
    world = World(max_resident_tokens=24)
    names = [prefix("t", name) for name in ("a", "b", "c", "d")]
    for handle in (*names[:3], names[0], names[3]):
        world.ask(handle, tokens=1)
        for _ in range(5):
            world.step()
    assert world.resident() == {"a-8", "c-8", "d-8"}


def test_a_pinned_prefix_stays_until_something_could_never_run_beside_it() -> None:
    world = World(max_resident_tokens=24)
    world.scheduler.prefix_loader.set_pins([prefix("t", "pinned")])
    for _ in range(3):
        world.step()
    assert world.resident() == {"pinned-8"}
    for name in "abcdef":
        world.ask(prefix("t", name), tokens=1)
        for _ in range(5):
            world.step()
    assert "pinned-8" in world.resident()
    large = world.ask(prefix("t", "large", 20))
    for _ in range(20):
        world.step()
    assert large.reason is FinishReason.LENGTH
    world.ask(prefix("t", "a"), tokens=1)
    for _ in range(10):
        world.step()
    assert "pinned-8" in world.resident(), "a pin comes back"
    world.scheduler.prefix_loader.set_pins([])
    world.ask(prefix("t", "large", 24))
    for _ in range(10):
        world.step()
    assert "pinned-8" not in world.resident()


def test_pins_keep_to_the_cap_of_their_tenant_and_give_way_within_it() -> None:
    world = World()
    pins = [prefix("t", "p"), prefix("t", "q")]
    world.scheduler.prefix_loader.set_pins(pins, caps={"t": 12})
    for _ in range(10):
        world.step()
    assert world.resident() == {"p-8"}
    request = AdmittedRequest(
        "r", "t", (1,), prefix("t", "x"), SamplingParams(), StopParams(2), max_resident_tokens=12
    )
    sequence = Sequence(99, request, 0, 0, [1])
    world.scheduler.add(sequence, now=world.now)
    for _ in range(30):
        world.step()
    assert sequence.reason is FinishReason.LENGTH


def test_the_last_sequence_gets_the_room_even_of_a_pin() -> None:
    world = World(num_blocks=9)
    world.scheduler.prefix_loader.set_pins([prefix("t", "pinned")])
    for _ in range(3):
        world.step()
    long = world.ask(tokens=30)  # 32 tokens: the whole pool
    for _ in range(40):
        world.step()
    assert long.reason is FinishReason.LENGTH


def test_what_was_evicted_comes_back_from_host_memory_without_a_fetch() -> None:
    world = World(max_resident_tokens=8, host_tokens=16)
    for name in ("a", "b", "a", "b", "c", "d", "a"):
        world.ask(prefix("t", name), tokens=1)
        for _ in range(6):
            world.step()
    fetched = [key.digest for step in world.steps for key in step.fetches]
    assert fetched == ["a-8", "b-8", "c-8", "d-8", "a-8"], "only what host memory lost"
    assert world.scheduler.prefix_loader.num_loads == {"store": 5, "host": 2}
    assert world.scheduler.memory.host.num_tokens <= 16


def test_a_warmed_prefix_comes_and_pushes_nobody_out_who_is_wanted() -> None:
    world = World(max_resident_tokens=16)
    world.scheduler.prefix_loader.preloads.add(prefix("t", "warm"), cap=None, now=0.0)
    for _ in range(3):
        world.step()
    assert world.resident() == {"warm-8"}
    assert not world.scheduler.prefix_loader.preloads
    assert world.scheduler.memory.residency.num_compiles == 1


def test_wishes_that_cannot_come_true_block_nobody_and_fetch_nothing() -> None:
    world = World(max_resident_tokens=16, max_staged=2)
    running = [world.ask(prefix("t", name), tokens=40) for name in "ab"]
    for _ in range(4):
        world.step()
    for name in "wxyz":
        world.scheduler.prefix_loader.preloads.add(prefix("t", name), cap=None, now=world.now)
    world.scheduler.prefix_loader.set_pins([prefix("t", "pin")], caps={"t": 4})
    for _ in range(4):
        world.step()
    assert {key.digest for step in world.steps for key in step.fetches} == {"a-8", "b-8"}
    # And where they were fetched and then lost their room, they make way.
    for sequence in running:
        world.scheduler.end(sequence, End(FinishReason.ABORT))
    step = world.scheduler.schedule(now=world.now)
    assert {key.digest for key in step.fetches} == {"w-8", "x-8"}
    world.scheduler.update(step, world.runner.run(step))
    for name in "cd":
        world.ask(prefix("t", name), tokens=1)
    for key in step.fetches:
        world.scheduler.prefix_staged(key, FakeStaged(8), now=world.now)
    for _ in range(8):
        world.step()
    assert world.served["c-8"] == world.served["d-8"] == 1


def test_one_tenants_warms_that_find_no_room_do_not_hold_up_anothers() -> None:
    world = World(max_staged=2)
    for number in range(20):
        world.scheduler.prefix_loader.preloads.add(
            prefix("full", f"w{number}"), cap=4, now=world.now
        )
    world.scheduler.prefix_loader.preloads.add(prefix("other", "mine"), cap=None, now=world.now)
    for _ in range(15):
        world.step()
    assert world.resident() == {"mine-8"}


def test_one_tenants_crowd_of_warms_leaves_places_for_others() -> None:
    preloads = Preloads(limit=4)
    for name in "abcd":
        assert not preloads_full(preloads.by_tenant(), "crowd", limit=4)
        preloads.add(prefix("crowd", name), cap=None, now=0.0)
    assert preloads_full(preloads.by_tenant(), "crowd", limit=4)
    preloads.add(prefix("crowd", "e"), cap=None, now=0.0)  # one that raced past the question
    assert [warm.handle for warm in preloads] == [prefix("crowd", name) for name in "bcde"]
    for name in "xy":
        assert not preloads_full(preloads.by_tenant(), "other", limit=4)
        preloads.add(prefix("other", name), cap=None, now=0.0)
    assert [warm.handle.key.tenant for warm in preloads] == ["crowd", "crowd", "other", "other"]
    assert preloads_full(preloads.by_tenant(), "other", limit=4)
    assert not preloads_full(preloads.by_tenant(), "third", limit=4)
    preloads.add(prefix("other", "x"), cap=7, now=0.0)  # again: takes no other place
    assert len(preloads) == 4


def test_a_wish_that_could_not_be_had_is_not_fetched_over_and_over() -> None:
    world = World(failed_prefix_memory_s=5.0)
    gone = prefix("t", "gone")
    world.scheduler.prefix_loader.set_pins([gone])
    fetches = 0
    for _ in range(100):
        world.now += 0.1
        for key in world.scheduler.schedule(now=world.now).fetches:
            fetches += 1
            world.scheduler.prefix_failed(key, "gone", now=world.now)
    assert fetches == 2


def test_a_retired_prefix_leaves_with_its_last_sequence() -> None:
    world = World(host_tokens=100)
    running = world.ask(prefix("t", "old"), tokens=6)
    for _ in range(3):
        world.step()
    world.scheduler.prefix_loader.retire([prefix("t", "old").key])
    world.step()
    assert world.resident() == {"old-8"}
    while not running.finished:
        world.step()
    world.step()
    assert world.resident() == set()
    assert len(world.scheduler.memory.host) == 0
    # Asked for again, it comes again and stays.
    world.ask(prefix("t", "old"), tokens=1)
    for _ in range(5):
        world.step()
    assert world.resident() == {"old-8"}


def test_a_prefix_that_could_not_be_had_is_not_asked_for_again_for_a_while() -> None:
    world = World(failed_prefix_memory_s=5.0)
    gone = prefix("t", "gone")
    world.ask(gone)
    step = world.scheduler.schedule(now=world.now)
    assert step.fetches == [gone.key]
    assert len(world.scheduler.prefix_failed(gone.key, "gone", now=world.now)) == 1
    world.now += 4.9
    at_once = world.ask(gone)
    assert at_once.end == End(FinishReason.ERROR, error="gone")
    world.now += 0.2
    world.ask(gone, tokens=1)
    for _ in range(5):
        world.step()
    assert world.served["gone-8"] == 1


def test_all_compiles_of_a_step_together_are_one_chunk_and_decodes_go_on() -> None:
    world = World(max_prefill_chunk=6, max_tokens_per_step=64, num_blocks=200)
    streams = [world.ask(tokens=60) for _ in range(3)]
    world.step()
    for name in "abc":
        world.ask(prefix("t", name, 20))
    for _ in range(14):
        step = world.step()
        assert sum(part.stop - part.start for part in step.compiles) <= 6
        assert {s.seq_id for s in streams} <= {chunk.seq_id for chunk in step.chunks}
    assert world.resident() == {"a-20", "b-20", "c-20"}


def test_a_tenant_whose_prefix_is_on_its_way_saves_nothing_up() -> None:
    """Its turn came and it could not use it: afterwards it shares, and does not own the server."""
    world = World(max_running=1)
    slow = prefix("slow", "slow")
    key = slow.key
    for _ in range(40):
        world.ask(slow, tokens=1)
    fetching = world.scheduler.schedule(now=world.now)
    assert fetching.fetches == [key]
    for _ in range(120):
        if len(world.scheduler.waiting.of("base")) < 3:
            world.ask(tokens=1)
        world.step()
    assert world.served == {"base": 120}
    world.scheduler.prefix_staged(key, FakeStaged(8), now=world.now)
    for _ in range(30):
        if len(world.scheduler.waiting.of("base")) < 3:
            world.ask(tokens=1)
        world.step()
    assert world.served["base"] - 120 > 15
    assert world.served["slow-8"] > 3
