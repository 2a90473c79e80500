"""The buckets of tenants as rows of the catalog: one UPDATE refills, tests and takes from both."""

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    case,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.buckets import Bucket, headers_of
from prefixd.server.tenants.portions import Held, PortionSize
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.tables import rate_limits
from prefixd.store.db.database import upsert

MAX_LEAD_S = 60.0
"""How far a bucket's time may be ahead of the clock, in seconds. Beyond that the clock was set back
and the bucket's time is reset to it; up to that it is another process that is ahead."""

# More than any limit: the bucket of a new limit begins full.
_FULL = 1e18
# A client that waited as long as Retry-After said is not refused for a rounding error.
_ROUNDING = 1e-6


def take(
    connection: Connection,
    tenant: str,
    quota: Quota,
    now: ColumnElement[float],
    *,
    tokens: int | None,
    held: Held,
    size: PortionSize | None = None,
) -> tuple[tuple[Bucket, ...] | RateLimited, PortionSize | None]:
    """Take one request and ``tokens``, less what this process has ``held``; None needs no tokens to
    remain. With a portion of ``size`` too, which is returned, if the buckets stay half full.

    A refusal is returned, so that the transaction is committed: it may have reset the time of the
    buckets."""
    cost = (1.0 - held.requests, (tokens or 0) - held.tokens)
    least = min(tokens or 0, quota.tokens_per_minute or tokens or 0) - held.tokens
    needs = (cost[0], -_FULL if tokens is None else float(least))
    attempts: list[tuple[tuple[float, float], tuple[float, float], PortionSize | None]]
    attempts = [(needs, cost, None)]
    if size is not None:
        cost = (cost[0] + size.requests, cost[1] + size.tokens)
        halves = ((quota.requests_per_minute or 0) / 2, (quota.tokens_per_minute or 0) / 2)
        attempts.insert(0, ((cost[0] + halves[0], cost[1] + halves[1]), cost, size))
    for is_new in (False, True):
        if is_new:  # or its buckets hold too little
            begin = {"tenant": tenant, "requests": _FULL, "tokens": _FULL, "at": now}
            connection.execute(upsert(connection, rate_limits, update=()).values(begin))
        for least_levels, spent, portion in attempts:
            taking = _taking(tenant, quota, now, needs=least_levels, cost=spent)
            row = connection.execute(taking).first()
            if row is not None:
                return _buckets(quota, row), portion
    return _refused(connection, tenant, quota, now, needs), None


def _taking(
    tenant: str,
    quota: Quota,
    now: ColumnElement[float],
    *,
    needs: tuple[float, float],
    cost: tuple[float, float],
) -> ReturningUpdate[Any]:
    """The statement that takes ``cost`` from buckets that hold ``needs`` at least."""
    requests, remaining = _levels(quota, now)
    return (
        update(rate_limits)
        .where(
            rate_limits.c.tenant == tenant,
            requests >= needs[0] - _ROUNDING,
            remaining >= needs[1] - _ROUNDING,
        )
        .values(requests=requests - cost[0], tokens=remaining - cost[1], at=_later(now))
        .returning(rate_limits.c.requests, rate_limits.c.tokens)
    )


def _refused(
    connection: Connection,
    tenant: str,
    quota: Quota,
    now: ColumnElement[float],
    needs: tuple[float, float],
) -> RateLimited:
    """The refusal of a request that needs more than the buckets hold, which this does not change,
    except for a time that is too far ahead."""
    mine = rate_limits.c.tenant == tenant
    requests, remaining = _levels(quota, now)
    ahead = _is_ahead(now)
    levels = select(requests.label("requests"), remaining.label("tokens"), ahead.label("ahead"))
    row = connection.execute(levels.where(mine)).one()
    if row.ahead:
        connection.execute(update(rate_limits).where(mine, ahead).values(at=now))
    return _refusal(_buckets(quota, row), needs)


def charge(
    connection: Connection,
    tenant: str,
    quota: Quota,
    now: ColumnElement[float],
    *,
    tokens: float,
    requests: float = 0,
) -> None:
    requests_level, tokens_level = _levels(quota, now)
    connection.execute(
        update(rate_limits)
        .where(rate_limits.c.tenant == tenant)
        .values(
            requests=requests_level - float(requests),
            tokens=tokens_level - float(tokens),
            at=_later(now),
        )
    )


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
