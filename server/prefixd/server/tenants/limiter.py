"""Rates and concurrency of a tenant, counted in the catalog: they hold across all replicas.

Two token buckets share one row, and one UPDATE refills, tests and takes from both. What a request
costs is known in two parts: at the door one request and its prompt, at its end its output. The
token bucket may therefore go below zero; nobody is let in until it is full enough again.
"""

import time
import uuid
from collections.abc import Callable, Mapping
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
from prefixd.server.tenants.ratelimit_headers import Bucket, headers_of
from prefixd.server.tenants.tables import rate_limits, request_leases
from prefixd.server.tenants.upsert import upsert
from prefixd.store.db.database import writing

LEASE_S = 60.0
"""How long a request that nobody renews counts as running."""

RENEW_EVERY_S = LEASE_S / 3

# More than any limit: a bucket that was not limited before begins full.
_FULL = 1e18
_CONCURRENCY_RETRY_S = 1.0
# Who waits as long as told must not be refused for the last bit of a float.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to run one request. ``headers`` say what is left; ``lease`` is None where nothing
    counts concurrent requests."""

    tenant: str
    quota: Quota
    headers: Mapping[str, str] = field(default_factory=dict)
    lease: str | None = None


class Limiter:
    """Blocking calls on the catalog; safe to share between threads. Tenants without such limits
    cost it nothing. The replicas' clocks should agree: one that is a minute ahead grants that
    minute's refill early, once."""

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
            left = self._take(connection, tenant, quota, now=now, tokens=tokens)
            lease = self._lease(connection, tenant, quota, now=now)
        if lease is not None:
            self._running.add(lease)
        return Grant(tenant, quota, headers_of(left), lease)

    def count(self, tenant: str, quota: Quota) -> Mapping[str, str]:
        """Take one request that generates nothing; headers that say what is left. Raises
        RateLimited."""
        if quota.requests_per_minute is None:
            return {}
        with writing(self._engine) as connection:
            left = self._take(connection, tenant, quota, now=self._now(), tokens=None)
        return headers_of(left)

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
        """Push on the leases of the requests that run here; to be called every ``RENEW_EVERY_S``.

        Not of those that have ended: where the database was away just then, their places are free
        again when the leases end.
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
        """Take one request and ``tokens``; None is let in however few are left."""
        requests, left = _levels(quota, now)
        asked = tokens or 0
        needs = (1.0, float(min(asked, quota.tokens_per_minute or asked)))
        if tokens is None:
            needs = (1.0, -_FULL)
        taking = (
            update(rate_limits)
            .where(rate_limits.c.tenant == tenant, requests >= needs[0] - _ROUNDING)
            .where(left >= needs[1] - _ROUNDING)
            .values(requests=requests - 1.0, tokens=left - float(asked), at=_later(now))
            .returning(rate_limits.c.requests, rate_limits.c.tokens)
        )
        row = connection.execute(taking).first()
        if row is None:
            begin = {"tenant": tenant, "requests": _FULL, "tokens": _FULL, "at": now}
            connection.execute(upsert(connection, rate_limits, update=()), begin)
            row = connection.execute(taking).first()
        if row is not None:
            return _buckets(quota, row)
        levels = select(requests.label("requests"), left.label("tokens"))
        found = connection.execute(levels.where(rate_limits.c.tenant == tenant)).one()
        raise _refusal(_buckets(quota, found), needs)

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
        left_requests, left = _levels(grant.quota, now)
        connection.execute(
            update(rate_limits)
            .where(rate_limits.c.tenant == grant.tenant)
            .values(
                requests=left_requests - float(requests),
                tokens=left - float(tokens),
                at=_later(now),
            )
        )


def _free(connection: Connection, grant: Grant) -> None:
    if grant.lease is not None:
        connection.execute(delete(request_leases).where(request_leases.c.id == grant.lease))


def _later(now: float) -> ColumnElement[float]:
    return case((rate_limits.c.at < now, literal(now)), else_=rate_limits.c.at)


def _levels(quota: Quota, now: float) -> tuple[ColumnElement[float], ColumnElement[float]]:
    """What the two buckets hold ``now``: refilled since ``at``, and never over the brim."""
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
