"""Pin sync alone: what it applies to the pool, when, and after which errors."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import OperationalError

from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.serve.pin_sync import PinSync
from prefixd.server.tenants.pin_room import PinRoom, pins_that_fit
from prefixd.store.catalog.pins import Pinned
from prefixd.store.names import BlobKey
from prefixd.store.store import Change, PrefixStore

KEY = BlobKey("acme", "d" * 64)


class FakeStore:
    """Pins as a test sets them; ``broken`` is an unavailable database."""

    def __init__(self) -> None:
        self.pins: list[Pinned] = []
        self.broken = False
        self.fingerprints: set[str] = set()
        self.deleted_keys: set[BlobKey] = set()
        self.watcher: Callable[[Change], None] | None = None

    def watch(self, watcher: Callable[[Change], None]) -> None:
        self.watcher = watcher

    def pinned(self, *, fingerprint: str) -> list[Pinned]:
        self.fingerprints.add(fingerprint)
        if self.broken:
            raise OperationalError("SELECT", {}, Exception("unavailable"))
        return list(self.pins)

    def deleted(self, keys: Collection[BlobKey]) -> list[BlobKey]:
        if self.broken:
            raise OperationalError("SELECT", {}, Exception("unavailable"))
        return [key for key in keys if key in self.deleted_keys]


class FakePool:
    """Records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[object]]] = []
        self.caps: Mapping[str, int] | None = None
        self.resident: set[PrefixKey] = set()
        self.changed = threading.Condition()

    def record(self, method: str, arguments: Iterable[object]) -> None:
        with self.changed:
            self.calls.append((method, list(arguments)))
            self.changed.notify_all()

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        self.caps = caps
        self.record("pins", handles)

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        self.record("retire", keys)

    def wait_until(self, call: tuple[str, list[object]]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: call in self.calls, timeout=30)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@contextmanager
def running(store: FakeStore, pool: FakePool, *, interval_s: float) -> Iterator[PinSync]:
    prefix_store: PrefixStore = store  # type: ignore[assignment]  # the part of it that is used
    pin_sync = PinSync(
        prefix_store,
        pool,
        fingerprint="base",
        room=PinRoom(48, block_size=16),
        resident_keys=lambda: pool.resident,
        resident_caps=lambda tenants: dict.fromkeys(tenants, 9),
        interval_s=interval_s,
    )
    pin_sync.start()
    try:
        yield pin_sync
    finally:
        pin_sync.stop()


PINNED: tuple[str, list[object]] = (
    "pins",
    [PrefixHandle(PrefixKey("acme", "d" * 64), num_tokens=7)],
)


def test_existing_pins_are_applied_at_start(store: FakeStore, pool: FakePool) -> None:
    store.pins = [Pinned(KEY, 7)]
    with running(store, pool, interval_s=3600):
        pool.wait_until(PINNED)
    assert pool.calls == [PINNED]
    assert pool.caps == {"acme": 9}
    assert store.fingerprints == {"base"}


def test_pins_of_another_server_are_applied_at_an_interval(
    store: FakeStore, pool: FakePool
) -> None:
    with running(store, pool, interval_s=0.001):
        pool.wait_until(("pins", []))
        store.pins = [Pinned(KEY, 7)]
        pool.wait_until(PINNED)
        store.pins.clear()
        pool.calls.clear()
        pool.wait_until(("pins", []))


def test_prefixes_deleted_by_another_server_are_retired_at_an_interval(
    store: FakeStore, pool: FakePool
) -> None:
    deleted, unchanged = PrefixKey("acme", "e" * 64), PrefixKey("beta", "e" * 64)
    pool.resident = {deleted, unchanged}
    with running(store, pool, interval_s=0.001):
        pool.wait_until(("pins", []))
        store.deleted_keys = {BlobKey("acme", "e" * 64), BlobKey("acme", "f" * 64)}
        pool.wait_until(("retire", [deleted]))
    assert all(keys == [deleted] for method, keys in pool.calls if method == "retire")


def test_a_local_change_applies_pins_before_it_retires_orphans(
    store: FakeStore, pool: FakePool
) -> None:
    with running(store, pool, interval_s=3600):
        pool.wait_until(("pins", []))
        store.pins = [Pinned(KEY, 7)]
        assert store.watcher is not None
        orphan = BlobKey("acme", "e" * 64)
        store.watcher(Change((orphan,), pins=True))
        assert pool.calls[1:] == [PINNED, ("retire", [PrefixKey("acme", "e" * 64)])]
        store.watcher(Change(pins=True))
        assert pool.calls[3:] == [PINNED]


def test_an_unavailable_catalog_unpins_nothing_and_does_not_end_pin_sync(
    store: FakeStore, pool: FakePool, caplog: pytest.LogCaptureFixture
) -> None:
    store.broken = True
    with running(store, pool, interval_s=0.001) as pin_sync:
        pin_sync.changed(Change((KEY,)))
        assert "could not be read" in caplog.text
        assert pool.calls == [("retire", [PrefixKey("acme", "d" * 64)])]
        store.pins = [Pinned(KEY, 7)]
        store.broken = False
        pool.wait_until(PINNED)


def test_pins_that_do_not_fit_are_omitted(
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
    with running(store, pool, interval_s=0.001) as pin_sync:
        pin_sync.refresh()
        pin_sync.refresh()
    assert pool.calls[-1][1] == [
        PrefixHandle(PrefixKey("acme", "a"), 5),
        PrefixHandle(PrefixKey("acme", "c"), 4),
        PrefixHandle(PrefixKey("beta", "a"), 9),
    ]
    assert caplog.text.count("2 pins have no room here") == 1


def test_a_pin_takes_the_blocks_that_the_pool_holds_of_it() -> None:
    inside = "{prefix:0:2}{prompt}{prefix:2:20}"
    room = PinRoom(64, block_size=16, state_blocks=1)
    assert room.taken_by(Pinned(KEY, 20)) == 3 * 16
    assert room.taken_by(Pinned(KEY, 20, inside)) == 2 * 16
    assert room.taken_by(Pinned(KEY, 20, "{prompt}{prefix:0:20}")) == 0
    pins = [Pinned(BlobKey("acme", digest), 20, inside) for digest in "abc"]
    assert pins_that_fit(pins, {"acme": 3}, room) == tuple(pins[:1])
    assert pins_that_fit(pins, {}, room) == tuple(pins[:2])
