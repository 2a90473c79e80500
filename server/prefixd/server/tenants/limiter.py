"""Rates and concurrency of a tenant, counted in the catalog: they hold across all replicas.

Two token buckets share one row, and one UPDATE refills, tests and takes from both. What a request
costs is known in two parts: at admission one request and its prompt, at its end its output. The
token bucket may therefore fall below zero; no request is admitted until it is full enough again.

Of large limits each process takes more than it needs, so that most requests need no transaction:
see ``portions``.

The replicas share one clock: the database's, read within the statements, on PostgreSQL, and the
host's on SQLite. It may be set, so a row can carry a time from the future.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy import ColumnElement, Connection, Engine

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.bucket_rows import charge, take
from prefixd.server.tenants.buckets import Bucket, duration, headers_of
from prefixd.server.tenants.leases import LEASE_S, RENEW_EVERY_S, Leases, delete_leases, new_lease
from prefixd.server.tenants.portions import Held, Portion, Portions
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.shared_clock import shared_now
from prefixd.store.db.database import writing_relaxed

__all__ = ["LEASE_S", "RENEW_EVERY_S", "Bucket", "Grant", "Limiter", "duration", "headers_of"]


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
        self._portions = Portions()

    def admit(self, tenant: str, quota: Quota, *, tokens: int, lease: str | None = None) -> Grant:
        """Take one request and ``tokens`` of prompt. Raises RateLimited. ``lease`` is the id for
        its lease: a caller that has it can free a lease of which it was not told."""
        grant = self.admit_at_once(tenant, quota, tokens=tokens)
        if grant is not None:
            return grant
        with self._portions.turn(tenant, quota):
            grant = self._from_portion(tenant, quota, tokens)  # another request's, meanwhile
            return grant or self._from_catalog(tenant, quota, tokens, lease=lease or new_lease())

    def admit_at_once(self, tenant: str, quota: Quota, *, tokens: int) -> Grant | None:
        """As ``admit``, without the catalog: it does not block. None: that needs a transaction."""
        if not quota.is_metered:
            return Grant(tenant, quota)
        return self._from_portion(tenant, quota, tokens)

    def takes_portions(self, tenant: str, quota: Quota) -> bool:
        """Whether a transaction of ``admit`` would take a portion, for other requests too."""
        return quota.is_metered and self._portions.size_for(tenant, quota) is not None

    def _from_portion(self, tenant: str, quota: Quota, tokens: int) -> Grant | None:
        used = self._portions.use(tenant, quota, tokens=tokens)
        if used is None:
            return None
        lease, buckets = used
        return Grant(tenant, quota, headers_of(buckets), lease)

    def _from_catalog(self, tenant: str, quota: Quota, tokens: int, *, lease: str) -> Grant:
        held = self._portions.hold(tenant)
        try:
            if held is not None and held.quota != quota:  # the limits have changed since
                self._return(tenant, held)
                held = None
            return self._admit(tenant, quota, tokens, lease=lease, held=held)
        except BaseException:
            if held is not None:
                self._portions.keep(tenant, held)
            raise

    def _admit(
        self, tenant: str, quota: Quota, tokens: int, *, lease: str, held: Portion | None
    ) -> Grant:
        """In a transaction: with a portion, where the limits have room for one. On success nothing
        of ``held`` counts any more."""
        now, limit = self._now(), quota.max_concurrent_requests
        wanted = self._portions.size_for(tenant, quota)
        spare = list(held.leases) if held else []
        balance = held.held if held else Held()
        new: list[str] = []
        with writing_relaxed(self._engine) as connection:
            # The update locks the tenant's row, so that leases are counted one after the other.
            taken, size = take(
                connection, tenant, quota, now, tokens=tokens, held=balance, size=wanted
            )
            if limit is not None and not spare and not isinstance(taken, RateLimited):
                more = [new_lease() for _ in range(size.leases)] if size else []
                new = self._leases.take(
                    connection, tenant, lease=lease, spare=more, limit=limit, now=now
                )
        if wanted is not None and size is None:
            self._portions.postpone(tenant)
        if isinstance(taken, RateLimited):
            raise taken
        for each in new:
            self._leases.add(each, tenant)
        spare += new
        own = spare.pop(0) if limit is not None else None
        shown = taken
        if size is not None:
            self._portions.add(tenant, quota, size, leases=spare, buckets=taken)
            kept = {"requests": size.requests, "tokens": size.tokens}
            shown = tuple(bucket.later(0.0, added=kept[bucket.name]) for bucket in taken)
        elif held is not None:
            left = replace(held, requests=0.0, tokens=0.0, owed=0, leases=spare)
            self._portions.keep(tenant, left)
        return Grant(tenant, quota, headers_of(shown), own)

    def count(self, tenant: str, quota: Quota) -> Mapping[str, str]:
        """Take one request that generates no tokens; headers with the remaining rates. Raises
        RateLimited."""
        if quota.requests_per_minute is None:
            return {}
        with writing_relaxed(self._engine) as connection:
            taken, _ = take(connection, tenant, quota, self._now(), tokens=None, held=Held())
        if isinstance(taken, RateLimited):
            raise taken
        return headers_of(taken)

    def settle_later(self, grant: Grant, *, output_tokens: int) -> bool:
        """As ``settle``, without a transaction: within about a second, by ``return_portions``.
        False: no portion of this process could hold the charge."""
        return self._portions.owe(
            grant.tenant, grant.quota, tokens=output_tokens, lease=grant.lease
        )

    def settle(self, grant: Grant, *, output_tokens: int, unsure: bool = False) -> None:
        """The request has ended: charge its output and free its place. ``unsure``: an earlier
        attempt may have been committed; then only a request that still has its lease is charged."""
        self._leases.forget(grant.lease)
        charges = grant.quota.tokens_per_minute is not None and output_tokens > 0
        if not charges and grant.lease is None:
            return
        with writing_relaxed(self._engine) as connection:
            freed = _free(connection, grant)
            if charges and (freed or not unsure or grant.lease is None):
                charge(connection, grant.tenant, grant.quota, self._now(), tokens=output_tokens)

    def give_back(self, grant: Grant, *, tokens: int, unsure: bool = False) -> None:
        """The server did not serve the request: return it and its ``tokens`` of prompt, and free
        its place. ``unsure``: as for ``settle``, or it may not have been admitted at all."""
        self._leases.forget(grant.lease)
        with writing_relaxed(self._engine) as connection:
            if _free(connection, grant) or not unsure:
                charge(
                    connection, grant.tenant, grant.quota, self._now(), tokens=-tokens, requests=-1
                )

    @property
    def has_portions(self) -> bool:
        """Whether ``return_portions`` has anything to do, now or soon."""
        return len(self._portions) > 0

    def return_portions(self, *, all_of_them: bool = False) -> None:
        """Charge the output that is owed, and give back what was not used, of the portions that
        are old enough; to be called every half second, and for all at the end. What cannot be
        returned is kept."""
        old = self._portions.take_old(all_of_them=all_of_them)
        while old:
            tenant, portion = old.popitem()
            try:
                self._return(tenant, portion)
            except BaseException:
                old[tenant] = portion
                for name, kept in old.items():
                    self._portions.keep(name, kept)
                raise

    def _return(self, tenant: str, portion: Portion) -> None:
        tokens, requests = portion.owed - portion.tokens, -portion.requests
        with writing_relaxed(self._engine) as connection:
            charge(connection, tenant, portion.quota, self._now(), tokens=tokens, requests=requests)
            if portion.leases:
                delete_leases(connection, portion.leases)
        for lease in portion.leases:
            self._leases.forget(lease)

    def renew(self) -> None:
        """Extend the leases of the requests running in this process; to be called every
        ``RENEW_EVERY_S``.

        Leases of ended requests, kept because the database was unavailable, expire by themselves.
        """
        self._leases.renew(self._engine, now=self._now())

    def _now(self) -> ColumnElement[float]:
        return shared_now(self._engine, self._clock)


def _free(connection: Connection, grant: Grant) -> bool:
    """Whether the request had a lease, which is now free."""
    return grant.lease is not None and delete_leases(connection, [grant.lease]) > 0
