"""The stages of an entry: allowed transitions, order of use, claims and counts."""

import pytest

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Entry, Stage
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.residency import Residency
from prefixd.server.testing import FakeStaged

CONFIG = SchedulerConfig(num_blocks=17, block_size=4)


def handle(name: str, length: int = 6) -> PrefixHandle:
    return PrefixHandle(PrefixKey("t", name), length)


@pytest.fixture
def residency() -> Residency:
    return Residency(CONFIG, pool=BlockPool(num_blocks=CONFIG.num_blocks))


def make_resident(residency: Residency, name: str, *, forced: bool = False) -> Entry:
    entry = residency.fetch(handle(name))
    residency.staged(entry, FakeStaged(entry.num_tokens))
    residency.place(entry, forced=forced)
    residency.compiles(entry, entry.num_tokens)
    residency.compiled(entry)
    return entry


def test_stages_follow_the_table(residency: Residency) -> None:
    entry = residency.fetch(handle("a"))
    stages = [entry.stage]
    residency.staged(entry, FakeStaged(6))
    stages.append(entry.stage)
    assert len(residency.place(entry, forced=False)) == 2
    residency.compiles(entry, 4)
    stages.append(entry.stage)
    residency.unplace(entry)
    assert (entry.stage, entry.num_compiled, entry.blocks) == (Stage.STAGED, 0, [])
    residency.place(entry, forced=True)
    residency.compiles(entry, 6)
    residency.compiled(entry)
    stages.append(entry.stage)
    residency.leave(entry)
    stages.append(entry.stage)
    residency.stay()
    stages.append(entry.stage)
    assert stages == [
        Stage.FETCHING,
        Stage.STAGED,
        Stage.COMPILING,
        Stage.RESIDENT,
        Stage.LEAVING,
        Stage.RESIDENT,
    ]
    residency.check_integrity()
    residency.evict(entry)
    assert residency.get(entry.key) is None
    assert (len(residency), residency.num_tokens, residency.num_loading) == (0, 0, 0)
    residency.check_integrity()


def test_leaving_entry_keeps_its_place_in_the_order_of_use(residency: Residency) -> None:
    first, second, third = (make_resident(residency, name) for name in "abc")
    residency.leave(first)
    assert list(residency.order.idle()) == [first, second, third]
    residency.stay()
    assert list(residency.order.idle()) == [first, second, third]
    residency.acquire(first.key)
    residency.release(first.key)
    assert list(residency.order.idle()) == [second, third, first]


def test_no_sequence_starts_under_a_leaving_entry(residency: Residency) -> None:
    entry = make_resident(residency, "a")
    residency.acquire(entry.key)
    residency.leave(entry)
    with pytest.raises(AssertionError):
        residency.acquire(entry.key)
    with pytest.raises(AssertionError):
        residency.evict(entry)  # a sequence still runs under it
    residency.release(entry.key)
    residency.evict(entry)
    assert residency.num_evictions == 1


def test_first_use_ends_a_reservation(residency: Residency) -> None:
    entry = make_resident(residency, "a", forced=True)
    assert residency.is_reserved(entry) is False, "no sequence waits for it"
    residency.add_waiter(entry.key)
    assert residency.is_reserved(entry)
    residency.acquire(entry.key)
    assert not residency.is_reserved(entry)


def test_every_kind_of_claim_counts(residency: Residency) -> None:
    key = handle("a").key
    assert not residency.is_claimed(key)
    residency.add_waiter(key)
    residency.add_waiter(key)
    residency.remove_waiter(key)
    assert residency.is_claimed(key)
    residency.remove_waiter(key)
    assert not residency.is_claimed(key)
    residency.set_pins({key: handle("a")})
    assert residency.is_claimed(key)
    residency.set_pins({})
    residency.preloads = {key}
    assert residency.is_claimed(key)
