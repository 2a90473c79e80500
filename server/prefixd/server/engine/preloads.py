"""Prefixes that shall come though no request waits for them: best effort, bounded, in turns."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from prefixd.server.engine.request import PrefixHandle, PrefixKey

_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Preload:
    """One of them. ``cap``: virtual tokens its tenant may have in the pool."""

    handle: PrefixHandle
    cap: int | None
    until: float


class Preloads:
    """What was warmed and is not there yet.

    When all places are taken the tenant that has most of them gives one up, so that nobody's
    crowd shuts out another tenant.
    """

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._warms: dict[PrefixKey, Preload] = {}

    def __len__(self) -> int:
        return len(self._warms)

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._warms

    def __iter__(self) -> Iterator[Preload]:
        """All, and the caller may drop them meanwhile."""
        return iter(list(self._warms.values()))

    def full_for(self, tenant: str) -> bool:
        """Whether another one of ``tenant`` would only push out one of its own. Safe from any
        thread."""
        held = Counter(key.tenant for key in list(self._warms))
        return held.total() >= self._most and held[tenant] == max(held.values())

    def add(self, handle: PrefixHandle, *, cap: int | None, now: float) -> None:
        """Take one in; it is given up after a while."""
        self._warms[handle.key] = Preload(handle, cap, now + _PATIENCE_S)
        if len(self._warms) > self._most:
            ((crowd, _),) = Counter(key.tenant for key in self._warms).most_common(1)
            self.drop(next(key for key in self._warms if key.tenant == crowd))

    def drop(self, key: PrefixKey) -> None:
        """Forget one, if it is there."""
        self._warms.pop(key, None)

    def take_turns(self, count: int) -> list[Preload]:
        """The next ``count``, which go to the end of the line."""
        turn = list(self._warms)[:count]
        for key in turn:
            self._warms[key] = self._warms.pop(key)
        return [self._warms[key] for key in turn]
