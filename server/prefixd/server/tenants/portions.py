"""What this process has taken from its tenants' limits and not used yet.

Most requests of a busy tenant need no transaction: they take from a portion, which was taken from
the catalog in one::

    catalog    [##########........]   --- portion: 1/256 of a minute --->   process   [####]
                      ^                                                                |  request
                      |                                                                v
                      +--- after a second: what is left, less the output owed ---   [###.]

The limit holds: a portion is gone from the catalog before it is used. Until it is returned other
processes may refuse that much too early, so a portion is taken only while the buckets are half
full, and of large limits only. A process that is killed loses what its portions held.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

from prefixd.server.tenants.buckets import Bucket
from prefixd.server.tenants.quotas import Quota

PORTION_S = 1.0
"""How long a portion is kept, in seconds."""

TURN_S = 0.25
"""The longest wait of a request for another that takes a portion, in seconds. Then it takes one
too: a database that hangs must not make its callers wait one after the other."""

_TURNS = 16
_SHARE, _LEASE_SHARE = 256, 16
_LEAST_REQUESTS, _LEAST_LEASES = 2560, 256
_UNLIMITED = 64


@dataclass(frozen=True, slots=True)
class PortionSize:
    """How much of a tenant's limits one process takes at a time."""

    requests: int
    tokens: int
    leases: int

    @classmethod
    def of(cls, quota: Quota) -> Self | None:
        """None: the limits are too small to be divided."""
        requests, tokens = quota.requests_per_minute, quota.tokens_per_minute
        leases = quota.max_concurrent_requests
        if requests is not None and requests < _LEAST_REQUESTS:
            return None
        if tokens is not None and tokens < _LEAST_REQUESTS * _UNLIMITED:
            return None
        if leases is not None and leases < _LEAST_LEASES:
            return None
        return cls(
            requests=_UNLIMITED if requests is None else requests // _SHARE,
            tokens=0 if tokens is None else tokens // _SHARE,
            leases=0 if leases is None else leases // _LEASE_SHARE,
        )


@dataclass(frozen=True, slots=True)
class Held:
    """Requests and tokens of a portion that the next transaction accounts for. ``tokens`` may be
    below zero: output that is owed."""

    requests: float = 0.0
    tokens: float = 0.0


@dataclass(slots=True)
class Portion:
    """``requests`` and ``tokens`` that may be used, ``owed`` output tokens that are not charged
    yet, and ``leases`` without a request. ``since`` is when it was begun, and ``buckets`` are those
    of the catalog at ``buckets_at``."""

    quota: Quota
    size: PortionSize
    since: float
    buckets: tuple[Bucket, ...] = ()
    buckets_at: float = 0.0
    requests: float = 0.0
    tokens: float = 0.0
    owed: int = 0
    leases: list[str] = field(default_factory=list)

    @property
    def held(self) -> Held:
        """What the catalog does not have of it."""
        return Held(self.requests, self.tokens - self.owed)

    def merge(self, other: "Portion") -> None:
        """Take over what ``other`` has."""
        if not self.buckets:
            self.buckets, self.buckets_at = other.buckets, other.buckets_at
        self.requests += other.requests
        self.tokens += other.tokens
        self.owed += other.owed
        self.leases += other.leases


class Portions:
    """The portions of this process by tenant; safe to share between threads. Nothing here waits
    for the catalog. ``now`` is in seconds on a clock that does not go back."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._by_tenant: dict[str, Portion] = {}
        self._not_before: dict[str, float] = {}
        self._turns = tuple(threading.Lock() for _ in range(_TURNS))

    def __len__(self) -> int:
        return len(self._by_tenant)

    def use(
        self, tenant: str, quota: Quota, *, tokens: int
    ) -> tuple[str | None, tuple[Bucket, ...]] | None:
        """Take one request and ``tokens`` of prompt: a lease, where the quota needs one, and the
        buckets after it. None: the portion has too little."""
        with self._lock:
            portion = self._by_tenant.get(tenant)
            if portion is None or portion.quota != quota or portion.requests < 1:
                return None
            if quota.tokens_per_minute is not None and portion.tokens - portion.owed < tokens:
                return None
            if quota.max_concurrent_requests is not None and not portion.leases:
                return None
            lease = portion.leases.pop() if portion.leases else None
            portion.requests -= 1
            portion.tokens -= tokens
            return lease, self._buckets(portion)

    def owe(self, tenant: str, quota: Quota, *, tokens: int, lease: str | None) -> bool:
        """A request has ended: its output is charged later, and its lease kept for the next one.
        A portion that was returned meanwhile is begun again, with nothing in it. False: the portion
        has no room for them, or none may be taken now."""
        charged = tokens if quota.tokens_per_minute is not None else 0
        if not charged and lease is None:
            return True
        with self._lock:
            portion = self._by_tenant.get(tenant)
            if portion is None:
                size = self.size_for(tenant, quota)
                if size is None:
                    return False
                portion = self._by_tenant[tenant] = Portion(quota, size, self._now())
            if portion.quota != quota:
                return False
            if portion.owed + charged > portion.size.tokens or (
                lease is not None and len(portion.leases) >= 2 * portion.size.leases
            ):
                return False
            portion.owed += charged
            if lease is not None:
                portion.leases.append(lease)
            return True

    @contextmanager
    def turn(self, tenant: str, quota: Quota) -> Iterator[None]:
        """Take a portion inside the block, one request of a tenant after the other: those that
        arrive together then share the first one's."""
        if self.size_for(tenant, quota) is None:
            yield
            return
        lock = self._turns[hash(tenant) % _TURNS]
        is_ours = lock.acquire(timeout=TURN_S)
        try:
            yield
        finally:
            if is_ours:
                lock.release()

    def size_for(self, tenant: str, quota: Quota) -> PortionSize | None:
        """The portion that a transaction may take; None: none now."""
        if self._not_before.get(tenant, 0.0) > self._now():
            return None
        return PortionSize.of(quota)

    def postpone(self, tenant: str) -> None:
        """The buckets were not half full: take no portion for a while."""
        with self._lock:
            now = self._now()
            self._not_before = {t: at for t, at in self._not_before.items() if at > now}
            self._not_before[tenant] = now + PORTION_S

    def hold(self, tenant: str) -> Portion | None:
        """Take everything out of the portion, for a transaction to account for. What follows is
        ``keep``, or ``add``."""
        with self._lock:
            held = self._by_tenant.get(tenant)
            if held is not None:
                self._by_tenant[tenant] = replace(held, requests=0.0, tokens=0.0, owed=0, leases=[])
            return held

    def keep(self, tenant: str, portion: Portion) -> None:
        """Put a portion back, which no transaction has accounted for."""
        with self._lock:
            newer = self._by_tenant.setdefault(tenant, portion)
            if newer is not portion:
                newer.merge(portion)

    def add(
        self,
        tenant: str,
        quota: Quota,
        size: PortionSize,
        *,
        leases: list[str],
        buckets: tuple[Bucket, ...],
    ) -> None:
        """A transaction took a portion of ``size``; ``leases`` have no request."""
        with self._lock:
            portion = self._by_tenant.get(tenant)
            if portion is None:
                portion = self._by_tenant[tenant] = Portion(quota, size, self._now())
            portion.quota, portion.size = quota, size
            portion.buckets, portion.buckets_at = buckets, self._now()
            portion.requests += size.requests
            portion.tokens += size.tokens
            portion.leases += leases

    def take_old(self, *, all_of_them: bool) -> dict[str, Portion]:
        """Remove the portions that are PORTION_S old, or all, to be returned to the catalog."""
        with self._lock:
            before = self._now() - PORTION_S
            old = {
                tenant: portion
                for tenant, portion in self._by_tenant.items()
                if all_of_them or portion.since <= before
            }
            for tenant in old:
                del self._by_tenant[tenant]
            return old

    def _buckets(self, portion: Portion) -> tuple[Bucket, ...]:
        kept = {"requests": portion.requests, "tokens": portion.tokens - portion.owed}
        seconds = self._now() - portion.buckets_at
        return tuple(b.later(seconds, added=kept[b.name]) for b in portion.buckets)
