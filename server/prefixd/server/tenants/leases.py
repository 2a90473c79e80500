"""Leases of running requests: rows that count a tenant's requests on all replicas.

A row whose process was killed expires. The clock may be set: a lease of this process is then kept,
and one of another process that looks expired is deleted and inserted again by its process.
"""

import uuid

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.tables import request_leases
from prefixd.store.db.database import writing_relaxed

LEASE_S = 60.0
"""How long a request counts as running after its lease was last renewed, in seconds."""

RENEW_EVERY_S = LEASE_S / 3

_CONCURRENCY_RETRY_S = 1.0


class Leases:
    """The leases of the requests that run in this process; safe to share between threads."""

    def __init__(self) -> None:
        self._holder = uuid.uuid4().hex
        self._running: dict[str, str] = {}  # tenant by lease

    def take(
        self,
        connection: Connection,
        tenant: str,
        *,
        lease: str,
        spare: list[str],
        limit: int,
        now: ColumnElement[float],
    ) -> list[str]:
        """Insert ``lease``, and those of ``spare`` with which the limit stays half free; returns
        all that were inserted. Raises RateLimited when ``limit`` requests of the tenant run. The
        caller holds a lock of the tenant and calls ``add`` after the transaction."""
        stale = func.coalesce(func.sum(case((_is_stale(now), 1), else_=0)), 0)
        counts = select(func.count().label("leases"), stale.label("stale"))
        row = connection.execute(counts.where(request_leases.c.tenant == tenant)).one()
        running = int(row.leases)
        if row.stale:
            running -= self._delete_stale(connection, tenant, now=now)
        if running >= limit:
            raise RateLimited(
                f"the tenant may run {limit} requests at once, and {running} are running",
                code="concurrency_limit_exceeded",
                retry_after=_CONCURRENCY_RETRY_S,
            )
        leases = [lease, *spare[: max(0, limit // 2 - running - 1)]]
        self._insert(connection, dict.fromkeys(leases, tenant), now=now)
        return leases

    def add(self, lease: str, tenant: str) -> None:
        """The request of ``lease`` runs: ``renew`` keeps it."""
        self._running[lease] = tenant

    def forget(self, lease: str | None) -> None:
        """The request has ended; to be called before its lease is deleted, which may fail."""
        if lease is not None:
            self._running.pop(lease, None)

    def renew(self, engine: Engine, *, now: ColumnElement[float]) -> None:
        """Extend all leases, and insert those again that another process deleted."""
        running = self._running.copy()
        if not running:
            return
        with writing_relaxed(engine) as connection:
            extended = set(self._extend(connection, list(running), now=now))
            deleted = {
                lease: tenant
                for lease, tenant in running.items()
                if lease not in extended and lease in self._running
            }
            if deleted:
                self._insert(connection, deleted, now=now)
        # A request that ended before the insert has freed nothing.
        ended = [lease for lease in deleted if lease not in self._running]
        if ended:
            with writing_relaxed(engine) as connection:
                delete_leases(connection, ended)

    def _delete_stale(
        self, connection: Connection, tenant: str, *, now: ColumnElement[float]
    ) -> int:
        """Delete the stale leases of other processes, extend those of this one; how many were
        deleted. A row that another transaction changes now is not stale for long."""
        stale = connection.scalars(
            select(request_leases.c.id)
            .where(request_leases.c.tenant == tenant, _is_stale(now))
            .with_for_update(skip_locked=True)
        ).all()
        own = [lease for lease in stale if lease in self._running]
        ended = [lease for lease in stale if lease not in self._running]
        if own:
            self._extend(connection, own, now=now)
        if ended:
            delete_leases(connection, ended)
        return len(ended)

    def _insert(
        self, connection: Connection, leases: dict[str, str], *, now: ColumnElement[float]
    ) -> None:
        rows = [
            {"id": lease, "tenant": tenant, "holder": self._holder}
            for lease, tenant in leases.items()
        ]
        connection.execute(insert(request_leases).values(expires_at=now + LEASE_S), rows)

    @staticmethod
    def _extend(
        connection: Connection, leases: list[str], *, now: ColumnElement[float]
    ) -> list[str]:
        extending = update(request_leases).where(request_leases.c.id.in_(leases))
        extending = extending.values(expires_at=now + LEASE_S)
        return list(connection.scalars(extending.returning(request_leases.c.id)))


def delete_leases(connection: Connection, leases: list[str]) -> int:
    """Delete the leases of requests that have ended; how many there were."""
    deleting = delete(request_leases).where(request_leases.c.id.in_(leases))
    return connection.execute(deleting).rowcount


def new_lease() -> str:
    """The id of a lease that is not taken yet."""
    return uuid.uuid4().hex


def _is_stale(now: ColumnElement[float]) -> ColumnElement[bool]:
    """Expired, or from a clock that was set back since."""
    expires_at = request_leases.c.expires_at
    return or_(expires_at <= now, expires_at > now + literal(2 * LEASE_S))
