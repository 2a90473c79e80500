"""The decision table of eviction, row by row: what is taken first, and what is kept."""

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Entry, Stage
from prefixd.server.engine.eviction import EvictionPolicy
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.residency import Residency
from prefixd.server.engine.step import Step
from prefixd.server.testing import FakeStaged

CONFIG = SchedulerConfig(num_blocks=6, block_size=4, host_tokens=100)


class Pool:
    """A pool of five blocks that prefixes of one block each fill."""

    def __init__(self) -> None:
        self.memory = Memory(CONFIG, namespace="")
        self.policy = EvictionPolicy(CONFIG, memory=self.memory)
        self.residency: Residency = self.memory.residency

    def add(self, name: str, *, forced: bool = False, used: bool = True) -> Entry:
        key = PrefixKey("t", name)
        entry = self.residency.fetch(PrefixHandle(key, 4))
        self.residency.staged(entry, FakeStaged(4))
        self.residency.place(entry, forced=forced)
        self.residency.compiles(entry, 4)
        self.residency.compiled(entry)
        if used:
            self.memory.pool.release(self.residency.acquire(key).blocks)
            self.residency.release(key)
        return entry

    def evict_all(self, *, alone: bool) -> list[str]:
        """Digests in the order in which they leave for the blocks of a running sequence."""
        digests = []
        while self.policy.room_for_block(step := Step(), alone=alone):
            self.memory.pool.allocate(1)
            digests += [save.key.digest for save in step.saves]
        return digests


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_idle_prefixes_leave_by_waiters_then_by_last_use(pool: Pool) -> None:
    for name in ("waiting", "old", "new"):
        pool.add(name)
    pool.add("unused waiting", used=False)
    pool.add("unused", used=False)
    for name in ("waiting", "unused waiting"):
        pool.residency.add_waiter(PrefixKey("t", name))
    order = ["old", "new", "unused", "waiting", "unused waiting"]
    assert pool.evict_all(alone=False) == order


def test_kept_prefixes_leave_only_for_the_last_running_sequence(pool: Pool) -> None:
    leaving, pinned = pool.add("leaving"), pool.add("pinned")
    reserved = pool.add("reserved", forced=True, used=False)
    pool.add("free"), pool.add("other free")
    pool.residency.leave(leaving)
    pool.residency.set_pins({pinned.key: PrefixHandle(pinned.key, 4)})
    pool.residency.add_waiter(reserved.key)
    assert pool.evict_all(alone=False) == ["free", "other free"]
    assert leaving.stage is Stage.LEAVING
    assert pool.evict_all(alone=True) == ["leaving", "reserved", "pinned"]


def test_retired_prefix_is_not_saved_to_the_host_tier(pool: Pool) -> None:
    for name in "abcde":
        pool.add(name)
    pool.policy.retired.add(PrefixKey("t", "a"))
    assert pool.evict_all(alone=False) == ["b", "c", "d", "e"]


def test_compile_loses_its_blocks_before_kept_prefixes_do(pool: Pool) -> None:
    pinned = [pool.add(name) for name in "abcd"]
    pool.residency.set_pins({entry.key: PrefixHandle(entry.key, 4) for entry in pinned})
    compiling = pool.residency.fetch(PrefixHandle(PrefixKey("t", "compiling"), 4))
    pool.residency.staged(compiling, FakeStaged(4))
    pool.residency.place(compiling, forced=False)
    assert pool.policy.room_for_block(Step(), alone=False)
    assert compiling.stage is Stage.STAGED
    assert all(entry.is_compiled for entry in pinned)


def test_prefix_that_is_not_overdue_takes_no_prefix_with_waiters(pool: Pool) -> None:
    entries = [pool.add(name) for name in "abcde"]
    for entry in entries[1:]:
        pool.residency.add_waiter(entry.key)
    needed = Entry(PrefixKey("t", "needed"), 8)
    plan = pool.policy.plan_for(needed, cap=None, forces=False)
    assert (plan.victims, plan.is_enough, plan.lacks_blocks) == ([entries[0]], False, True)
    plan = pool.policy.plan_for(needed, cap=None, forces=True)
    assert (plan.victims, plan.is_enough) == (entries[:2], True)
