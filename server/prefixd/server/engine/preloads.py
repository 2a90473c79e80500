"""Prefixes to load though no request waits for them, such as those that a client warms."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prefixd.server.engine.request import PrefixHandle, PrefixKey

MAX_PRELOADS = 256
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Preload:
    """A prefix to load though no request waits for it, given up at ``until``. ``cap``: virtual
    tokens its tenant may have in the pool."""

    handle: PrefixHandle
    cap: int | None
    until: float


class Preloads:
    """Preloads that are not resident yet: best effort, bounded, in turns.

    Above ``limit`` the tenant with the most of them loses one, so that no tenant can take all
    places. ``pending`` holds them in the order of their turns.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self.pending: dict[PrefixKey, Preload] = {}
        self.num_changes = 0

    def __len__(self) -> int:
        return len(self.pending)

    def __iter__(self) -> Iterator[Preload]:
        """All of them; the caller may drop them meanwhile."""
        return iter(list(self.pending.values()))

    def by_tenant(self) -> Counter[str]:
        """How many of them each tenant has."""
        return Counter(key.tenant for key in self.pending)

    def add(self, handle: PrefixHandle, *, cap: int | None, now: float) -> None:
        """Add one, or renew it."""
        self.num_changes += 1
        self.pending[handle.key] = Preload(handle, cap, now + _TIMEOUT_S)
        if len(self.pending) > self._limit:
            ((largest, _),) = self.by_tenant().most_common(1)
            self.drop(next(key for key in self.pending if key.tenant == largest))

    def drop(self, key: PrefixKey) -> None:
        """Drop one, if it is there."""
        self.num_changes += 1
        self.pending.pop(key, None)

    def take_turns(self, count: int) -> list[Preload]:
        """The next ``count``, which move to the end of the order."""
        keys = list(self.pending)[:count]
        for key in keys:
            self.pending[key] = self.pending.pop(key)
        return [self.pending[key] for key in keys]


def preloads_full(by_tenant: Mapping[str, int], tenant: str, *, limit: int = MAX_PRELOADS) -> bool:
    """Whether another preload of ``tenant`` would only replace one of its own, when each tenant
    has as many as ``by_tenant`` says."""
    largest = max(by_tenant.values(), default=0)
    return sum(by_tenant.values()) >= limit and by_tenant.get(tenant, 0) == largest
