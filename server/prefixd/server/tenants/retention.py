"""Removal of rows that are kept for a time: responses under idempotency keys, the audit log, files,
and batches that have ended."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Delete, Engine, and_, delete, exists, select, tuple_

from prefixd.server.tenants.batch_state import ENDED, OPEN
from prefixd.server.tenants.batches import Batches
from prefixd.server.tenants.tables import KEPT_FOR, audit_log, batches, idempotency_keys
from prefixd.store.catalog.tables import files
from prefixd.store.db.database import utc_now, writing
from prefixd.store.file_store import FileStore, expired

BATCH = 1000
"""Rows of one transaction: other writers wait for no longer."""


@dataclass(frozen=True, slots=True)
class Expired:
    """Rows that were removed."""

    idempotency_keys: int = 0
    audit_entries: int = 0
    files: int = 0
    batches: int = 0


def remove_expired(
    engine: Engine,
    *,
    audit_kept: timedelta | None,
    batches_kept: timedelta | None = None,
    store: FileStore | None = None,
    now: datetime | None = None,
) -> Expired:
    """Remove the responses that are no longer repeated, audit entries older than ``audit_kept``
    and batches that were created ``batches_kept`` ago and have ended (None: none of them), and the
    files of ``store`` that have expired, some at a time."""
    at = now or utc_now()
    num_keys, num_entries = _remove_keys(engine, at), _remove_entries(engine, audit_kept, at)
    num_files = 0 if store is None else _remove_files(engine, store, at)
    return Expired(num_keys, num_entries, num_files, _remove_batches(engine, batches_kept, at))


def _remove_files(engine: Engine, store: FileStore, at: datetime) -> int:
    """The input of a batch that has not ended stays."""
    in_use = exists().where(batches.c.input_file_id == files.c.id, batches.c.status.in_(OPEN))
    total = 0
    while True:
        with writing(engine) as connection:
            records = expired(connection, now=at, limit=BATCH, unless=in_use)
            store.delete_rows(connection, records)
        total += len(records)
        if len(records) < BATCH:
            return total


def _remove_batches(engine: Engine, kept: timedelta | None, at: datetime) -> int:
    Batches(engine).remove_answers()  # of ended ones, whose server was killed before it did
    if kept is None:
        return 0
    old = and_(batches.c.status.in_(ENDED), batches.c.created_at <= at - kept)
    some = select(batches.c.id).where(old).limit(BATCH)
    return _remove(engine, delete(batches).where(batches.c.id.in_(some)))


def _remove_keys(engine: Engine, at: datetime) -> int:
    keys = tuple_(idempotency_keys.c.tenant, idempotency_keys.c.key)
    old_keys = (
        select(idempotency_keys.c.tenant, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at <= at - KEPT_FOR)
        .limit(BATCH)
    )
    return _remove(engine, delete(idempotency_keys).where(keys.in_(old_keys)))


def _remove_entries(engine: Engine, kept: timedelta | None, at: datetime) -> int:
    if kept is None:
        return 0
    old_entries = select(audit_log.c.id).where(audit_log.c.at <= at - kept).limit(BATCH)
    return _remove(engine, delete(audit_log).where(audit_log.c.id.in_(old_entries)))


def _remove(engine: Engine, batch: Delete) -> int:
    """Run ``batch`` until it removes less than BATCH rows; the number removed."""
    total = 0
    while True:
        with writing(engine) as connection:
            removed = connection.execute(batch).rowcount
        total += removed
        if removed < BATCH:
            return total
