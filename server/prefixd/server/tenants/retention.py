"""Removal of rows that are kept for a time: responses under idempotency keys, the audit log."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Delete, Engine, delete, select, tuple_

from prefixd.server.tenants.tables import KEPT_FOR, audit_log, idempotency_keys
from prefixd.store.db.database import utc_now, writing

BATCH = 1000
"""Rows of one transaction: other writers wait for no longer."""


@dataclass(frozen=True, slots=True)
class Expired:
    """Rows that were removed."""

    idempotency_keys: int = 0
    audit_entries: int = 0


def remove_expired(
    engine: Engine, *, audit_kept: timedelta | None, now: datetime | None = None
) -> Expired:
    """Remove the responses that are no longer repeated, and audit entries older than ``audit_kept``
    (None: no entry), in batches."""
    at = now or utc_now()
    keys = tuple_(idempotency_keys.c.tenant, idempotency_keys.c.key)
    old_keys = (
        select(idempotency_keys.c.tenant, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at <= at - KEPT_FOR)
        .limit(BATCH)
    )
    num_keys = _remove(engine, delete(idempotency_keys).where(keys.in_(old_keys)))
    if audit_kept is None:
        return Expired(num_keys)
    old_entries = select(audit_log.c.id).where(audit_log.c.at <= at - audit_kept).limit(BATCH)
    num_entries = _remove(engine, delete(audit_log).where(audit_log.c.id.in_(old_entries)))
    return Expired(num_keys, num_entries)


def _remove(engine: Engine, batch: Delete) -> int:
    """Run ``batch`` until it removes less than BATCH rows; the number removed."""
    total = 0
    while True:
        with writing(engine) as connection:
            removed = connection.execute(batch).rowcount
        total += removed
        if removed < BATCH:
            return total
