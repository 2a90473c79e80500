"""Rates and concurrency of a tenant, counted in the catalog: they hold across all replicas.

Two token buckets share one row, and one UPDATE refills, tests and takes from both. What a request
costs is known in two parts: at admission one request and its prompt, at its end its output. The
token bucket may therefore fall below zero; no request is admitted until it is full enough again.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    case,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.tables import rate_limits, request_leases
from prefixd.store.db.database import upsert, writing

LEASE_S = 60.0
"""How long a request counts as running after its lease was last renewed, in seconds."""

RENEW_EVERY_S = LEASE_S / 3

# More than any limit: the bucket of a new limit begins full.
_FULL = 1e18
_CONCURRENCY_RETRY_S = 1.0
# A client that waited as long as Retry-After said is not refused for a rounding error.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket now: it holds at most ``limit`` and gets ``limit`` more in a minute."""

    name: str
    limit: int
    level: float

    def seconds_until(self, level: float) -> float:
        """Seconds until the bucket holds ``level``, if no request takes from it."""
        return max(0.0, level - self.level) * 60.0 / self.limit


@dataclass(frozen=True, slots=True)
class Grant:
    """An admitted request. ``headers`` give the remaining rates; ``lease`` is None for a tenant
    without a limit of concurrent requests."""

    tenant: str
    quota: Quota
    headers: Mapping[str, str] = field(default_factory=dict)
    lease: str | None = None


class Limiter:
    """Blocking calls on the catalog; safe to share between threads. A tenant without limits costs
    no query. The replicas' clocks should agree: one that is a minute ahead grants that minute's
    refill early, once."""

    def __init__(self, engine: Engine, *, now: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._now = now
        self._holder = uuid.uuid4().hex
        self._running: set[str] = set()  # leases of requests that run in this process

    def admit(self, tenant: str, quota: Quota, *, tokens: int) -> Grant:
        """Take one request and ``tokens`` of prompt. Raises RateLimited."""
        if not quota.is_metered:
            return Grant(tenant, quota)
        now = self._now()
        with writing(self._engine) as connection:
            # The update locks the tenant's row, so that leases are counted one after the other.
            buckets = self._take(connection, tenant, quota, now=now, tokens=tokens)
            lease = self._lease(connection, tenant, quota, now=now)
        if lease is not None:
            self._running.add(lease)
        return Grant(tenant, quota, headers_of(buckets), lease)

    def count(self, tenant: str, quota: Quota) -> Mapping[str, str]:
        """Take one request that generates no tokens; headers with the remaining rates. Raises
        RateLimited."""
        if quota.requests_per_minute is None:
            return {}
        with writing(self._engine) as connection:
            buckets = self._take(connection, tenant, quota, now=self._now(), tokens=None)
        return headers_of(buckets)

    def settle(self, grant: Grant, *, output_tokens: int) -> None:
        """The request has ended: charge its output and free its place."""
        self._forget(grant)
        charge = grant.quota.tokens_per_minute is not None and output_tokens > 0
        if not charge and grant.lease is None:
            return
        with writing(self._engine) as connection:
            if charge:
                self._charge(connection, grant, tokens=output_tokens)
            _free(connection, grant)

    def give_back(self, grant: Grant, *, tokens: int) -> None:
        """The server did not serve the request: return it and its ``tokens`` of prompt, and free
        its place."""
        self._forget(grant)
        with writing(self._engine) as connection:
            self._charge(connection, grant, tokens=-tokens, requests=-1)
            _free(connection, grant)

    def renew(self) -> None:
        """Extend the leases of the requests running in this process; to be called every
        ``RENEW_EVERY_S``.

        Leases of ended requests, kept because the database was unavailable, expire by themselves.
        """
        running = self._running.copy()
        if not running:
            return
        with writing(self._engine) as connection:
            mine = request_leases.c.id.in_(running)
            later = self._now() + LEASE_S
            connection.execute(update(request_leases).where(mine).values(expires_at=later))

    def _forget(self, grant: Grant) -> None:
        if grant.lease is not None:
            self._running.discard(grant.lease)

    def _take(
        self, connection: Connection, tenant: str, quota: Quota, *, now: float, tokens: int | None
    ) -> tuple[Bucket, ...]:
        """Take one request and ``tokens``; None needs no tokens to remain."""
        requests, remaining = _levels(quota, now)
        cost = tokens or 0
        needs = (1.0, float(min(cost, quota.tokens_per_minute or cost)))
        if tokens is None:
            needs = (1.0, -_FULL)
        taking = (
            update(rate_limits)
            .where(rate_limits.c.tenant == tenant, requests >= needs[0] - _ROUNDING)
            .where(remaining >= needs[1] - _ROUNDING)
            .values(requests=requests - 1.0, tokens=remaining - float(cost), at=_later(now))
            .returning(rate_limits.c.requests, rate_limits.c.tokens)
        )
        row = connection.execute(taking).first()
        if row is None:
            begin = {"tenant": tenant, "requests": _FULL, "tokens": _FULL, "at": now}
            connection.execute(upsert(connection, rate_limits, update=()), begin)
            row = connection.execute(taking).first()
        if row is not None:
            return _buckets(quota, row)
        levels = select(requests.label("requests"), remaining.label("tokens"))
        row = connection.execute(levels.where(rate_limits.c.tenant == tenant)).one()
        raise _refusal(_buckets(quota, row), needs)

    def _lease(
        self, connection: Connection, tenant: str, quota: Quota, *, now: float
    ) -> str | None:
        if quota.max_concurrent_requests is None:
            return None
        mine = request_leases.c.tenant == tenant
        connection.execute(delete(request_leases).where(mine, request_leases.c.expires_at <= now))
        running = connection.execute(
            select(func.count()).select_from(request_leases).where(mine)
        ).scalar_one()
        if running >= quota.max_concurrent_requests:
            raise RateLimited(
                f"the tenant may run {quota.max_concurrent_requests} requests at once, "
                f"and {running} are running",
                code="concurrency_limit_exceeded",
                retry_after=_CONCURRENCY_RETRY_S,
            )
        lease = uuid.uuid4().hex
        connection.execute(
            insert(request_leases).values(
                id=lease, tenant=tenant, holder=self._holder, expires_at=now + LEASE_S
            )
        )
        return lease

    def _charge(
        self, connection: Connection, grant: Grant, *, tokens: int, requests: int = 0
    ) -> None:
        now = self._now()
        requests_level, tokens_level = _levels(grant.quota, now)
        connection.execute(
            update(rate_limits)
            .where(rate_limits.c.tenant == grant.tenant)
            .values(
                requests=requests_level - float(requests),
                tokens=tokens_level - float(tokens),
                at=_later(now),
            )
        )


def _free(connection: Connection, grant: Grant) -> None:
    if grant.lease is not None:
        connection.execute(delete(request_leases).where(request_leases.c.id == grant.lease))


def _later(now: float) -> ColumnElement[float]:
    return case((rate_limits.c.at < now, literal(now)), else_=rate_limits.c.at)


def _levels(quota: Quota, now: float) -> tuple[ColumnElement[float], ColumnElement[float]]:
    """The levels of the two buckets ``now``: refilled since ``at``, up to the limit."""
    elapsed = _later(now) - rate_limits.c.at

    def level(column: ColumnElement[float], limit: int | None) -> ColumnElement[float]:
        if limit is None:
            return literal(_FULL)
        refilled = column + elapsed * (limit / 60.0)
        return case((refilled > float(limit), literal(float(limit))), else_=refilled)

    return (
        level(rate_limits.c.requests, quota.requests_per_minute),
        level(rate_limits.c.tokens, quota.tokens_per_minute),
    )


def _buckets(quota: Quota, row: Any) -> tuple[Bucket, ...]:
    pairs = (
        ("requests", quota.requests_per_minute, row.requests),
        ("tokens", quota.tokens_per_minute, row.tokens),
    )
    return tuple(Bucket(name, limit, level) for name, limit, level in pairs if limit is not None)


def _refusal(buckets: tuple[Bucket, ...], needs: tuple[float, float]) -> RateLimited:
    wanted = dict(zip(("requests", "tokens"), needs, strict=True))
    waits = {bucket.name: bucket.seconds_until(wanted[bucket.name]) for bucket in buckets}
    slowest = max(buckets, key=lambda bucket: waits[bucket.name])
    return RateLimited(
        f"the tenant's limit is {slowest.limit} {slowest.name} per minute; "
        f"try again in {waits[slowest.name]:.1f} s",
        retry_after=waits[slowest.name],
        headers=headers_of(buckets),
    )


def headers_of(buckets: Iterable[Bucket]) -> dict[str, str]:
    """``x-ratelimit-limit-``, ``-remaining-`` and ``-reset-requests`` and ``-tokens``; a reset is
    the time until the bucket is full."""
    headers = {}
    for bucket in buckets:
        headers[f"x-ratelimit-limit-{bucket.name}"] = str(bucket.limit)
        headers[f"x-ratelimit-remaining-{bucket.name}"] = str(max(0, math.floor(bucket.level)))
        headers[f"x-ratelimit-reset-{bucket.name}"] = duration(bucket.seconds_until(bucket.limit))
    return headers


def duration(seconds: float) -> str:
    """``seconds`` as OpenAI writes them, rounded up: 120ms, 7.5s, 6m0s, 1h2m0s."""
    thousandths = math.ceil(seconds * 1000)
    if thousandths < 1000:
        return f"{thousandths}ms"
    whole, rest = divmod(thousandths, 1000)
    hours, minutes, whole = whole // 3600, whole // 60 % 60, whole % 60
    shown = f"{hours}h" if hours else ""
    shown += f"{minutes}m" if hours or minutes else ""
    fraction = f".{rest:03d}".rstrip("0") if rest else ""
    return f"{shown}{whole}{fraction}s"
