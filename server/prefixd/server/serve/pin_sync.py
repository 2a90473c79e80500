"""What of the pool the catalog decides: pins are brought in and kept, what was deleted or replaced
leaves.

The catalog is the truth and several servers share it, so each reads it now and then, besides when
it makes a change itself: all of them converge, and a restart forgets nothing.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from logging import getLogger
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.tenants.quotas import PinRoom, pins_that_fit
from prefixd.store.names import BlobKey
from prefixd.store.store import Change, PrefixStore

EVERY_S = 10.0
"""How long another server's pin or delete takes at most to be known here."""

_STOP_S = 5.0
_log = getLogger("prefixd.pins")


class Pool(Protocol):
    """The part of the engine that this is about; both may be called from any thread."""

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Keep these and no others. ``caps``: virtual tokens that tenants may have resident."""
        ...

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Let these go when their last sequence does."""
        ...


class PinSync:
    """Tells ``pool`` what the catalog says of the prefixes of one base, in a thread of its own and
    after each change made through ``store``. ``held`` gives what the engine has or is fetching,
    ``caps_of`` the caps of those tenants that have one."""

    def __init__(
        self,
        store: PrefixStore,
        pool: Pool,
        *,
        fingerprint: str,
        room: PinRoom,
        held: Callable[[], Collection[PrefixKey]],
        caps_of: Callable[[Collection[str]], Mapping[str, int]],
        every_s: float = EVERY_S,
    ) -> None:
        self._store = store
        self._pool = pool
        self._held = held
        self._caps_of = caps_of
        self._room = room
        self._left_out = 0
        self._fingerprint = fingerprint
        self._every_s = every_s
        # One reads and tells after the other, or what was read first might be told last.
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixd-pins", daemon=True)

    def start(self) -> None:
        """Begin, with the pins there are."""
        self._store.watch(self.changed)
        self._thread.start()

    def stop(self) -> None:
        """End; pins stay as they are."""
        self._stop.set()
        self._thread.join(_STOP_S)  # one that waits for a database that is away is left behind

    def changed(self, change: Change) -> None:
        """A change was committed, on the caller's thread; never raises."""
        self.refresh()  # first, so that nothing is told to leave that is held as pinned
        if change.orphans:
            self._pool.retire([_prefix_key(key) for key in change.orphans])

    def refresh(self) -> None:
        """Tell the pool what is pinned now. Where the catalog is away, the next time will do."""
        with self._turn:
            try:
                found = self._store.pinned(fingerprint=self._fingerprint)
                caps = self._caps_of({one.key.tenant for one in found})
            except SQLAlchemyError:
                _log.exception("the pins could not be read; those known stay")
                return
            kept = pins_that_fit(found, caps, self._room)
            self._pool.set_pins(
                [PrefixHandle(_prefix_key(one.key), one.num_virtual_tokens) for one in kept],
                caps=caps,
            )
            if len(found) - len(kept) != self._left_out:
                self._left_out = len(found) - len(kept)
                _log.warning("%d pins have no room here", self._left_out)

    def tidy(self) -> None:
        """Let go what other servers deleted. Where the catalog is away, the next time will do."""
        held = [BlobKey(key.tenant, key.digest) for key in self._held()]
        try:
            deleted = self._store.deleted(held)
        except SQLAlchemyError:
            _log.exception("what was deleted could not be read; it stays")
            return
        if deleted:
            self._pool.retire([_prefix_key(key) for key in deleted])

    def _run(self) -> None:
        while True:
            self.refresh()
            self.tidy()
            if self._stop.wait(self._every_s):
                return


def _prefix_key(key: BlobKey) -> PrefixKey:
    return PrefixKey(tenant=key.tenant, digest=key.digest)
