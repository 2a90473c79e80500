"""Applies the catalog to the pool: pinned prefixes stay resident, deleted and replaced ones leave.

Several servers share one catalog. Each reads it at intervals and after its own changes, so that all
of them converge and pins survive a restart.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from logging import getLogger
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.placement import pinned_handle
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.tenants.pin_room import PinRoom, pins_that_fit
from prefixd.store.names import BlobKey
from prefixd.store.store import Change, PrefixStore

INTERVAL_S = 10.0
"""The longest time until another server's pin or deletion takes effect here, in seconds."""

_STOP_S = 5.0
_log = getLogger("prefixd.pins")


class Pool(Protocol):
    """The part of the engine that pin sync calls, from any thread."""

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Pin these and no others. ``caps``: the most resident virtual tokens by tenant."""
        ...

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Evict these after their last sequence."""
        ...


class PinSync:
    """Updates ``pool`` from the catalog, for the prefixes of one base: at intervals in a thread of
    its own, and after each change made through ``store``.

    ``resident_keys`` returns the prefixes that the engine holds or loads, ``resident_caps`` the
    caps of those tenants that have one.
    """

    def __init__(
        self,
        store: PrefixStore,
        pool: Pool,
        *,
        fingerprint: str,
        room: PinRoom,
        resident_keys: Callable[[], Collection[PrefixKey]],
        resident_caps: Callable[[Collection[str]], Mapping[str, int]],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._store = store
        self._pool = pool
        self._resident_keys = resident_keys
        self._resident_caps = resident_caps
        self._room = room
        self._num_omitted = 0
        self._fingerprint = fingerprint
        self._interval_s = interval_s
        # Held from reading the catalog to updating the pool, or an older reading could win.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixd-pins", daemon=True)

    def start(self) -> None:
        """Start the thread, which applies the current pins first."""
        self._store.watch(self.changed)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; pins do not change."""
        self._stop.set()
        self._thread.join(_STOP_S)  # it may still wait for an unavailable database

    def changed(self, change: Change) -> None:
        """Apply a committed change, on the caller's thread; never raises."""
        self.refresh()  # first: the pool does not evict a pinned prefix
        if change.orphans:
            self._pool.retire([_prefix_key(key) for key in change.orphans])

    def refresh(self) -> None:
        """Apply the current pins. While the database fails, the pool keeps those it has."""
        with self._lock:
            try:
                pins = self._store.pinned(fingerprint=self._fingerprint)
                caps = self._resident_caps({pin.key.tenant for pin in pins})
            except SQLAlchemyError:
                _log.exception("the pins could not be read; those known stay")
                return
            fitting = pins_that_fit(pins, caps, self._room)
            handles = (pinned_handle(pin) for pin in fitting)
            self._pool.set_pins([handle for handle in handles if handle is not None], caps=caps)
            if len(pins) - len(fitting) != self._num_omitted:
                self._num_omitted = len(pins) - len(fitting)
                _log.warning("%d pins have no room here", self._num_omitted)

    def retire_deleted(self) -> None:
        """Evict what other servers deleted, at a later interval while the database fails."""
        held = self._resident_keys()
        keys = {BlobKey(key.tenant, digest) for key in held for digest in key.digests}
        try:
            deleted = self._store.deleted(keys)
        except SQLAlchemyError:
            _log.exception("what was deleted could not be read; it stays")
            return
        if deleted:
            self._pool.retire([_prefix_key(key) for key in deleted])

    def _run(self) -> None:
        while True:
            self.refresh()
            self.retire_deleted()
            if self._stop.wait(self._interval_s):
                return


def _prefix_key(key: BlobKey) -> PrefixKey:
    return PrefixKey(tenant=key.tenant, digest=key.digest)
