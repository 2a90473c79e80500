"""Copying a whole store, tables and blobs, to another place: a backup, or a move.

From any driver to any other. The rows are one snapshot, read while other processes write; they are
committed after the blobs were copied, so that the copy never has a version without its blob.
"""

from dataclasses import dataclass

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    Table,
    func,
    insert,
    select,
    text,
    union_all,
)

from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.tables import blobs as blob_table
from prefixd.store.catalog.tables import files, versions
from prefixd.store.db.database import metadata, reading, writing
from prefixd.store.db.migrate import upgrade
from prefixd.store.errors import CopyRefused, CorruptArtifact, UnknownPrefix
from prefixd.store.files import copy_durably
from prefixd.store.names import BlobKey

_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """A database and the blobs its catalog refers to."""

    database: Engine
    blobs: Blobs


@dataclass(frozen=True, slots=True)
class CopyResult:
    """Rows by table, blobs and bytes of a copy, and the blobs that were corrupt at the source."""

    rows: dict[str, int]
    blobs: int
    bytes: int
    corrupt: tuple[BlobKey, ...]


def copy_store(source: Place, target: Place) -> CopyResult:
    """Copy every table of ``metadata`` and every referenced blob to an empty target.

    The digest of each blob is verified. A corrupt one is left out and reported; its versions are
    copied, marked as corrupt. Blobs of deleted prefixes are not copied.

    Import every module that defines tables first. Raises CopyRefused when the target is not empty.
    """
    upgrade(source.database)
    upgrade(target.database)
    count, size, lost = 0, 0, []
    # One transaction: an interrupted copy leaves an empty catalog, and can be started again.
    with writing(target.database) as connection:
        _check_empty(connection)
        # The rows first and at once: while a snapshot is open, SQLite's log and PostgreSQL's tables
        # only grow. Blobs are only added, so those of the snapshot still exist afterwards.
        with reading(source.database) as moment:
            rows = {
                table.name: _copy_rows(moment, connection, table)
                for table in metadata.sorted_tables
            }
        for key, size_bytes in referenced(connection):
            if _copy_blob(source.blobs, target.blobs, key):
                count, size = count + 1, size + size_bytes
            else:
                lost.append(key)
        # Blobs that were not copied are not collected at the target; missing ones are corrupt.
        _settle_blobs(connection, lost)
    return CopyResult(rows=rows, blobs=count, bytes=size, corrupt=tuple(lost))


def _check_empty(connection: Connection) -> None:
    for table in metadata.sorted_tables:
        if connection.execute(select(table).limit(1)).first() is not None:
            raise CopyRefused(
                f"expected an empty database to copy to, but its table {table.name} has rows"
            )


def referenced(connection: Connection) -> list[tuple[BlobKey, int]]:
    """The blobs of all versions and files, and their sizes in bytes."""
    all_of_them = union_all(
        *(select(table.c.tenant, table.c.digest, table.c.size_bytes) for table in (versions, files))
    ).subquery()
    key = (all_of_them.c.tenant, all_of_them.c.digest)
    statement = select(*key, func.max(all_of_them.c.size_bytes)).group_by(*key).order_by(*key)
    rows = connection.execute(statement)
    return [(BlobKey(tenant, digest), size_bytes) for tenant, digest, size_bytes in rows]


def _copy_blob(source: Blobs, target: Blobs, key: BlobKey) -> bool:
    try:
        path = source.fetch(tenant=key.tenant, digest=key.digest)
    except (CorruptArtifact, UnknownPrefix):
        return False
    with target.staging() as staged:
        copy_durably(path, staged)
        target.put(staged, tenant=key.tenant, digest=key.digest)
    return True


def _copy_rows(source: Connection, target: Connection, table: Table) -> int:
    count = 0
    rows = source.execution_options(yield_per=_ROWS).execute(select(table)).mappings()
    for batch in rows.partitions(_ROWS):
        target.execute(insert(table), [dict(row) for row in batch])
        count += len(batch)
    counter = _counter(table)
    if count and counter is not None and target.dialect.name == "postgresql":
        # The rows kept their numbers: continue counting after the largest.
        target.execute(
            text("SELECT setval(pg_get_serial_sequence(:table, :column), :last)"),
            {
                "table": table.name,
                "column": counter.name,
                "last": target.execute(select(func.max(counter))).scalar(),
            },
        )
    return count


def _counter(table: Table) -> "Column[int] | None":
    """The column that the database counts up, if the table has one."""
    column = table.autoincrement_column
    return column if column is not None and isinstance(column.type, Integer) else None


def _settle_blobs(connection: Connection, lost: list[BlobKey]) -> None:
    connection.execute(blob_table.delete().where(blob_table.c.unreferenced_at.is_not(None)))
    for key in lost:
        connection.execute(
            blob_table.update()
            .where(
                blob_table.c.tenant == key.tenant,
                blob_table.c.digest == key.digest,
                blob_table.c.corrupt_at.is_(None),
            )
            .values(corrupt_at=func.now())
        )
