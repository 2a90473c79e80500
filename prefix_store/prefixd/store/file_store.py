"""Files of tenants, such as the input and the output of a batch: bytes in blobs, names in rows.

A file is immutable. Its blob is written first, its row afterwards in a transaction of the caller,
so a file always has its blob, and a blob without a row was never acknowledged.
"""

import secrets
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, delete, insert, select, tuple_

from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobCollected, BlobRows, claim, release
from prefixd.store.catalog.tables import files
from prefixd.store.db.database import reading, writing
from prefixd.store.errors import UnknownFile, UnknownPrefix, quoted
from prefixd.store.files import copy_durably, sha256_of
from prefixd.store.names import BlobKey, check_tenant

FILE_ID = "file-[0-9a-f]{32}"
"""The regular expression of the ids of files."""

_ATTEMPTS = 10


class Purpose(StrEnum):
    """What a file is for."""

    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as listed. ``expires_at`` is when it is removed; None: never."""

    id: str
    tenant: str
    purpose: str
    filename: str
    digest: str
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None
    creator: str | None


@dataclass(frozen=True, slots=True)
class WrittenBlob:
    """Bytes that are durable and that no row refers to yet; see ``blob_rows``."""

    key: BlobKey
    size_bytes: int
    ticket: str


class FileStore:
    """Files of all tenants. Blocking; safe from several threads and processes at once. Another
    tenant's file and a missing one raise the same UnknownFile."""

    def __init__(
        self, engine: Engine, rows: BlobRows, blobs: Blobs, *, clock: Callable[[], datetime]
    ) -> None:
        self._engine = engine
        self._rows = rows
        self._blobs = blobs
        self._clock = clock

    def write(self, source: Path, *, tenant: str) -> WrittenBlob:
        """Copy the bytes of ``source`` to a blob; durable on return. Raises BlobsUnavailable."""
        check_tenant(tenant)
        for _ in range(_ATTEMPTS):
            with self._blobs.staging() as staged:
                copy_durably(source, staged)
                key, size = BlobKey(tenant, sha256_of(staged)), staged.stat().st_size
                ticket = self._rows.want(key, size_bytes=size, now=self._clock())
                try:
                    self._blobs.put(staged, tenant=tenant, digest=key.digest)
                except UnknownPrefix:  # collected when it was read back
                    continue
                return WrittenBlob(key, size, ticket)
        raise BlobCollected

    def change(self) -> AbstractContextManager[Connection]:
        """A transaction on files, committed at the end of the block."""
        return writing(self._engine)

    def add(
        self,
        connection: Connection,
        blob: WrittenBlob,
        *,
        purpose: Purpose,
        filename: str,
        kept: timedelta | None,
        creator: str | None,
    ) -> FileRecord:
        """Add the row of a file that is kept for ``kept`` (None: without an end). Raises
        BlobCollected when the blob was removed since it was written, after the grace of a
        collection: write it again."""
        claim(connection, blob.key, ticket=blob.ticket)
        now = self._clock()
        record = FileRecord(
            id=f"file-{secrets.token_hex(16)}",
            tenant=blob.key.tenant,
            purpose=purpose.value,
            filename=filename,
            digest=blob.key.digest,
            size_bytes=blob.size_bytes,
            created_at=now,
            expires_at=None if kept is None else now + kept,
            creator=creator,
        )
        row = {field.name: getattr(record, field.name) for field in fields(record)}
        connection.execute(insert(files).values(row))
        return record

    def get(self, file_id: str, *, tenant: str) -> FileRecord:
        """One file. Raises UnknownFile."""
        with reading(self._engine) as connection:
            return find(connection, file_id, tenant=tenant)

    def page(
        self,
        *,
        tenant: str,
        purpose: str | None = None,
        limit: int,
        after: str | None = None,
        oldest_first: bool = False,
    ) -> list[FileRecord]:
        """Files by the time of their creation, at most ``limit`` behind the file ``after``. Raises
        UnknownFile for an ``after`` that does not exist."""
        place = tuple_(files.c.created_at, files.c.id)
        order = [column.asc() if oldest_first else column.desc() for column in _ORDER]
        query = select(files).where(files.c.tenant == tenant).order_by(*order).limit(limit)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with reading(self._engine) as connection:
            if after is not None:
                last = find(connection, after, tenant=tenant)
                behind = (last.created_at, last.id)
                query = query.where(place > behind if oldest_first else place < behind)
            return [_record(row) for row in connection.execute(query)]

    def delete(self, connection: Connection, file_id: str, *, tenant: str) -> FileRecord:
        """Delete a file; its blob is collected later. Raises UnknownFile."""
        record = find(connection, file_id, tenant=tenant, locked=True)
        self.delete_rows(connection, [record])
        return record

    def delete_rows(self, connection: Connection, records: Collection[FileRecord]) -> None:
        """Delete files that exist and that no other transaction deletes now."""
        ids = [record.id for record in records]
        connection.execute(delete(files).where(files.c.id.in_(ids)))
        for tenant in sorted({record.tenant for record in records}):
            digests = [record.digest for record in records if record.tenant == tenant]
            release(connection, tenant, digests, now=self._clock())


_ORDER = (files.c.created_at, files.c.id)


def find(connection: Connection, file_id: str, *, tenant: str, locked: bool = False) -> FileRecord:
    """One file of a tenant; ``locked``: until the end of the transaction. Raises UnknownFile."""
    query = select(files).where(files.c.id == file_id, files.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if locked else query).first()
    if row is None:
        raise UnknownFile(f"no file {quoted(file_id)}")
    return _record(row)


def expired(
    connection: Connection, *, now: datetime, limit: int, unless: ColumnElement[bool]
) -> list[FileRecord]:
    """Files that are to be removed, locked, ``unless`` that condition holds; those that another
    transaction has locked are left out."""
    query = select(files).where(files.c.expires_at <= now, ~unless).order_by(files.c.expires_at)
    rows = connection.execute(query.limit(limit).with_for_update(skip_locked=True))
    return [_record(row) for row in rows]


def _record(row: Row[Any]) -> FileRecord:
    return FileRecord(**{field.name: getattr(row, field.name) for field in fields(FileRecord)})
