"""Rates and concurrency of a tenant, counted in the catalog: they hold across all replicas.

Two token buckets share one row, and one UPDATE refills, tests and takes from both. What a request
costs is known in two parts: at admission one request and its prompt, at its end its output. The
token bucket may therefore fall below zero; no request is admitted until it is full enough again.

The replicas share one clock: the database's, read within the statements, on PostgreSQL, and the
host's on SQLite. It may be set, so a row can carry a time from the future.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Engine,
    case,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy import cast as sql_cast

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.leases import LEASE_S, RENEW_EVERY_S, Leases, delete_leases, new_lease
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.tables import rate_limits
from prefixd.store.db.database import upsert, writing_relaxed

__all__ = ["LEASE_S", "RENEW_EVERY_S", "Bucket", "Grant", "Limiter", "duration", "headers_of"]

MAX_LEAD_S = 60.0
"""How far a bucket's time may be ahead of the clock, in seconds. Beyond that the clock was set back
and the bucket's time is reset to it; up to that it is another process that is ahead."""

# More than any limit: the bucket of a new limit begins full.
_FULL = 1e18
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
    no query.

    ``now`` replaces the shared clock, in seconds since 1970.
    """

    def __init__(self, engine: Engine, *, now: Callable[[], float] | None = None) -> None:
        self._engine = engine
        self._clock = now
        self._leases = Leases()

    def admit(self, tenant: str, quota: Quota, *, tokens: int, lease: str | None = None) -> Grant:
        """Take one request and ``tokens`` of prompt. Raises RateLimited. ``lease`` is the id for
        its lease: a caller that has it can free a lease of which it was not told."""
        if not quota.is_metered:
            return Grant(tenant, quota)
        now = self._now()
        limit = quota.max_concurrent_requests
        lease = None if limit is None else lease or new_lease()
        with writing_relaxed(self._engine) as connection:
            # The update locks the tenant's row, so that leases are counted one after the other.
            taken = _take(connection, tenant, quota, now=now, tokens=tokens)
            if limit is not None and lease is not None and not isinstance(taken, RateLimited):
                self._leases.take(connection, tenant, lease=lease, limit=limit, now=now)
        if isinstance(taken, RateLimited):
            raise taken
        if lease is not None:
            self._leases.add(lease, tenant)
        return Grant(tenant, quota, headers_of(taken), lease)

    def count(self, tenant: str, quota: Quota) -> Mapping[str, str]:
        """Take one request that generates no tokens; headers with the remaining rates. Raises
        RateLimited."""
        if quota.requests_per_minute is None:
            return {}
        with writing_relaxed(self._engine) as connection:
            taken = _take(connection, tenant, quota, now=self._now(), tokens=None)
        if isinstance(taken, RateLimited):
            raise taken
        return headers_of(taken)

    def settle(self, grant: Grant, *, output_tokens: int, unsure: bool = False) -> None:
        """The request has ended: charge its output and free its place. ``unsure``: an earlier
        attempt may have been committed; then only a request that still has its lease is charged."""
        self._leases.forget(grant.lease)
        charge = grant.quota.tokens_per_minute is not None and output_tokens > 0
        if not charge and grant.lease is None:
            return
        with writing_relaxed(self._engine) as connection:
            freed = _free(connection, grant)
            if charge and (freed or not unsure or grant.lease is None):
                _charge(connection, grant, now=self._now(), tokens=output_tokens)

    def give_back(self, grant: Grant, *, tokens: int, unsure: bool = False) -> None:
        """The server did not serve the request: return it and its ``tokens`` of prompt, and free
        its place. ``unsure``: as for ``settle``, or it may not have been admitted at all."""
        self._leases.forget(grant.lease)
        with writing_relaxed(self._engine) as connection:
            if _free(connection, grant) or not unsure:
                _charge(connection, grant, now=self._now(), tokens=-tokens, requests=-1)

    def renew(self) -> None:
        """Extend the leases of the requests running in this process; to be called every
        ``RENEW_EVERY_S``.

        Leases of ended requests, kept because the database was unavailable, expire by themselves.
        """
        self._leases.renew(self._engine, now=self._now())

    def _now(self) -> ColumnElement[float]:
        if self._clock is None and self._engine.dialect.name == "postgresql":
            # One reading for each statement, in whose places it then is.
            epoch = sql_cast(func.extract("epoch", func.clock_timestamp()), Double)
            clock = select(epoch.label("now")).cte("clock")
            return select(clock.c.now).scalar_subquery()
        return literal((self._clock or time.time)(), Double)


def _take(
    connection: Connection,
    tenant: str,
    quota: Quota,
    *,
    now: ColumnElement[float],
    tokens: int | None,
) -> tuple[Bucket, ...] | RateLimited:
    """Take one request and ``tokens``; None needs no tokens to remain. A refusal is returned, so
    that the transaction is committed: it may have reset the time of the buckets."""
    requests, remaining = _levels(quota, now)
    cost = tokens or 0
    needs = (1.0, float(min(cost, quota.tokens_per_minute or cost)))
    if tokens is None:
        needs = (1.0, -_FULL)
    mine = rate_limits.c.tenant == tenant
    taking = (
        update(rate_limits)
        .where(mine, requests >= needs[0] - _ROUNDING, remaining >= needs[1] - _ROUNDING)
        .values(requests=requests - 1.0, tokens=remaining - float(cost), at=_later(now))
        .returning(rate_limits.c.requests, rate_limits.c.tokens)
    )
    row = connection.execute(taking).first()
    if row is None:
        begin = {"tenant": tenant, "requests": _FULL, "tokens": _FULL, "at": now}
        connection.execute(upsert(connection, rate_limits, update=()).values(begin))
        row = connection.execute(taking).first()
    if row is not None:
        return _buckets(quota, row)
    ahead = _is_ahead(now)
    levels = select(requests.label("requests"), remaining.label("tokens"), ahead.label("ahead"))
    row = connection.execute(levels.where(mine)).one()
    if row.ahead:
        connection.execute(update(rate_limits).where(mine, ahead).values(at=now))
    return _refusal(_buckets(quota, row), needs)


def _charge(
    connection: Connection,
    grant: Grant,
    *,
    now: ColumnElement[float],
    tokens: int,
    requests: int = 0,
) -> None:
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


def _free(connection: Connection, grant: Grant) -> bool:
    """Whether the request had a lease, which is now free."""
    return grant.lease is not None and delete_leases(connection, [grant.lease]) > 0


def _is_ahead(now: ColumnElement[float]) -> ColumnElement[bool]:
    return rate_limits.c.at > now + MAX_LEAD_S


def _later(now: ColumnElement[float]) -> ColumnElement[float]:
    """The time of the buckets after a change ``now``: it does not go back, or two processes whose
    clocks differ would refill them twice; unless it is too far ahead."""
    return case((or_(rate_limits.c.at < now, _is_ahead(now)), now), else_=rate_limits.c.at)


def _levels(
    quota: Quota, now: ColumnElement[float]
) -> tuple[ColumnElement[float], ColumnElement[float]]:
    """The levels of the two buckets ``now``: refilled since ``at``, up to the limit."""
    elapsed = case((rate_limits.c.at < now, now - rate_limits.c.at), else_=0.0)

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
