"""The keeper of pins alone: what it tells, when, and after which trouble."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import OperationalError

from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.serve.pin_sync import PinSync
from prefixd.server.tenants.quotas import PinRoom
from prefixd.store.catalog.pins import Pinned
from prefixd.store.names import BlobKey
from prefixd.store.store import Change, PrefixStore

KEY = BlobKey("acme", "d" * 64)


class FakeStore:
    """Pins as a test sets them; ``broken`` is a database that is away."""

    def __init__(self) -> None:
        self.pins: list[Pinned] = []
        self.broken = False
        self.asked_for: set[str] = set()
        self.gone: set[BlobKey] = set()
        self.watcher: Callable[[Change], None] | None = None

    def watch(self, watcher: Callable[[Change], None]) -> None:
        self.watcher = watcher

    def pinned(self, *, fingerprint: str) -> list[Pinned]:
        self.asked_for.add(fingerprint)
        if self.broken:
            raise OperationalError("SELECT", {}, Exception("away"))
        return list(self.pins)

    def deleted(self, keys: Collection[BlobKey]) -> list[BlobKey]:
        if self.broken:
            raise OperationalError("SELECT", {}, Exception("away"))
        return [key for key in keys if key in self.gone]


class FakePool:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[object]]] = []
        self.caps: Mapping[str, int] | None = None
        self.held: set[PrefixKey] = set()
        self.news = threading.Condition()

    def note(self, word: str, what: Iterable[object]) -> None:
        with self.news:
            self.told.append((word, list(what)))
            self.news.notify_all()

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        self.caps = caps
        self.note("pins", handles)

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        self.note("retire", keys)

    def wait_until(self, told: tuple[str, list[object]]) -> None:
        with self.news:
            assert self.news.wait_for(lambda: told in self.told, timeout=30)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@contextmanager
def keeping(store: FakeStore, pool: FakePool, *, every_s: float) -> Iterator[PinSync]:
    stand_in: PrefixStore = store  # type: ignore[assignment]  # the part of it that is used
    keeper = PinSync(
        stand_in,
        pool,
        fingerprint="base",
        room=PinRoom(48, block_size=16),
        held=lambda: pool.held,
        caps_of=lambda tenants: dict.fromkeys(tenants, 9),
        every_s=every_s,
    )
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()


PINNED: tuple[str, list[object]] = (
    "pins",
    [PrefixHandle(PrefixKey("acme", "d" * 64), num_tokens=7)],
)


def test_the_pins_there_are_are_told_at_the_start(store: FakeStore, pool: FakePool) -> None:
    store.pins = [Pinned(KEY, 7)]
    with keeping(store, pool, every_s=3600):
        pool.wait_until(PINNED)
    assert pool.told == [PINNED]
    assert pool.caps == {"acme": 9}
    assert store.asked_for == {"base"}


def test_another_servers_pins_come_with_time(store: FakeStore, pool: FakePool) -> None:
    with keeping(store, pool, every_s=0.001):
        pool.wait_until(("pins", []))
        store.pins = [Pinned(KEY, 7)]
        pool.wait_until(PINNED)
        store.pins.clear()
        pool.told.clear()
        pool.wait_until(("pins", []))


def test_what_another_server_deleted_leaves_with_time(store: FakeStore, pool: FakePool) -> None:
    gone, kept = PrefixKey("acme", "e" * 64), PrefixKey("beta", "e" * 64)
    pool.held = {gone, kept}
    with keeping(store, pool, every_s=0.001):
        pool.wait_until(("pins", []))
        store.gone = {BlobKey("acme", "e" * 64), BlobKey("acme", "f" * 64)}
        pool.wait_until(("retire", [gone]))
    assert all(keys == [gone] for word, keys in pool.told if word == "retire")


def test_an_own_change_is_told_at_once_and_pins_before_leavers(
    store: FakeStore, pool: FakePool
) -> None:
    with keeping(store, pool, every_s=3600):
        pool.wait_until(("pins", []))
        store.pins = [Pinned(KEY, 7)]
        assert store.watcher is not None
        gone = BlobKey("acme", "e" * 64)
        store.watcher(Change((gone,), pins=True))
        assert pool.told[1:] == [PINNED, ("retire", [PrefixKey("acme", "e" * 64)])]
        store.watcher(Change(pins=True))
        assert pool.told[3:] == [PINNED]


def test_a_catalog_that_is_away_unpins_nothing_and_ends_no_keeper(
    store: FakeStore, pool: FakePool, caplog: pytest.LogCaptureFixture
) -> None:
    store.broken = True
    with keeping(store, pool, every_s=0.001) as keeper:
        keeper.changed(Change((KEY,)))
        assert pool.told == [("retire", [PrefixKey("acme", "d" * 64)])]
        store.pins = [Pinned(KEY, 7)]
        store.broken = False
        pool.wait_until(PINNED)
    assert "could not be read" in caplog.text


def test_what_cannot_come_in_is_not_asked_for(
    store: FakeStore, pool: FakePool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nine tokens a tenant, three blocks in all; limits may have been higher once."""
    store.pins = [
        Pinned(BlobKey(tenant, digest), size)
        for tenant, digest, size in (
            ("acme", "a", 5),
            ("acme", "b", 5),
            ("acme", "c", 4),
            ("beta", "a", 9),
            ("gamma", "a", 1),
        )
    ]
    with keeping(store, pool, every_s=0.001) as keeper:
        keeper.refresh()
        keeper.refresh()
    assert pool.told[-1][1] == [
        PrefixHandle(PrefixKey("acme", "a"), 5),
        PrefixHandle(PrefixKey("acme", "c"), 4),
        PrefixHandle(PrefixKey("beta", "a"), 9),
    ]
    assert caplog.text.count("2 pins have no room here") == 1
