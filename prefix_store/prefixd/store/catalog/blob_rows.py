"""Rows of blobs: which may exist, since when they are unreferenced, which are corrupt.

::

    (no row) --want--> unreferenced_at = now --claim--> unreferenced_at = null
        ^                   |         ^                         |
        +-----collect-------+         +---release, the last-----+

A version or a file references a blob. ``want`` commits before the blob is written, ``claim`` in
the transaction of the version or file, and ``collect`` removes blob and row under the row's lock.
So a publish either finds the row and keeps the blob, or finds none and starts over; the blob of a
version is never removed.

An existing row need not be the row that was wanted: that one may have been collected with its blob,
and another publish, which has not written the blob yet, created it again. The ticket identifies the
row: all publishes that want a blob share it, ``claim`` requires it, and ``collect`` commits that it
is void before it removes anything.
"""

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    and_,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)

from prefixd.store.catalog.tables import blobs, files, versions
from prefixd.store.db.database import insert_into, reading, writing
from prefixd.store.names import BlobKey

_PAGE = 500


class BlobCollected(Exception):
    """A collection removed a blob during its publish: start over."""


def claim(connection: Connection, key: BlobKey, *, ticket: str) -> None:
    """A version or file references this blob from now on, and its bytes were just verified.

    Raises BlobCollected when there is no such row, or not with the ticket that ``want`` gave.
    """
    claimed = connection.execute(
        update(blobs)
        .where(_is(key), blobs.c.ticket == ticket)
        .values(unreferenced_at=None, corrupt_at=None)
    )
    if claimed.rowcount == 0:
        raise BlobCollected


def release(connection: Connection, tenant: str, digests: Iterable[str], *, now: datetime) -> None:
    """Versions or files with these blobs were removed; mark the blobs that no other one has.

    The row is locked before its versions are queried: of two transactions that remove the last two
    versions, the second waits for the first, and then finds no version.
    """
    for digest in sorted(set(digests)):
        key = BlobKey(tenant, digest)
        connection.execute(select(blobs.c.digest).where(_is(key)).with_for_update())
        connection.execute(
            update(blobs).where(_is(key), ~_referenced()).values(unreferenced_at=now)
        )


class BlobRows:
    """Blobs of all tenants, as rows. Every method is one transaction, ``collect`` two for each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def want(self, key: BlobKey, *, size_bytes: int, now: datetime) -> str:
        """Record a blob that is about to be written: it is not collected for its grace.

        Returns the ticket to ``claim`` it with.
        """
        fresh = secrets.token_hex(16)
        with writing(self._engine) as connection:
            row = insert_into(connection, blobs).values(
                tenant=key.tenant,
                digest=key.digest,
                size_bytes=size_bytes,
                unreferenced_at=now,
                ticket=fresh,
            )
            statement = row.on_conflict_do_update(
                index_elements=["tenant", "digest"],
                set_={
                    "unreferenced_at": case((blobs.c.unreferenced_at.is_not(None), now)),
                    "ticket": func.coalesce(blobs.c.ticket, fresh),
                },
            )
            ticket: str = connection.execute(statement.returning(blobs.c.ticket)).scalar_one()
            return ticket

    def adopt(self, listing: Sequence[tuple[BlobKey, int]], *, now: datetime) -> int:
        """Add unreferenced rows for blobs (with their sizes) that have none; how many."""
        adopted = 0
        with writing(self._engine) as connection:
            for key, size_bytes in listing:
                row = insert_into(connection, blobs).values(
                    tenant=key.tenant, digest=key.digest, size_bytes=size_bytes, unreferenced_at=now
                )
                statement = row.on_conflict_do_nothing(index_elements=["tenant", "digest"])
                # Returned rows are counted, as an insert's rowcount is -1 with some drivers.
                adopted += len(connection.execute(statement.returning(blobs.c.digest)).all())
        return adopted

    def touch(self, keys: Collection[BlobKey], *, now: datetime) -> None:
        """These are in use: the grace of the unreferenced ones begins again."""
        with writing(self._engine) as connection:
            for key in sorted(keys):
                connection.execute(
                    update(blobs)
                    .where(_is(key), blobs.c.unreferenced_at < now)
                    .values(unreferenced_at=now)
                )

    def is_referenced(self, key: BlobKey) -> bool:
        """Whether a version or a file has this blob."""
        with reading(self._engine) as connection:
            return any(
                connection.execute(
                    select(table.c.digest)
                    .where(table.c.tenant == key.tenant, table.c.digest == key.digest)
                    .limit(1)
                ).first()
                for table in (versions, files)
            )

    def deleted(self, keys: Collection[BlobKey]) -> tuple[BlobKey, ...]:
        """Those of ``keys`` that no version has any more."""
        candidates, kept = sorted(keys), set[BlobKey]()
        pair = tuple_(versions.c.tenant, versions.c.digest)
        with reading(self._engine) as connection:
            for begin in range(0, len(candidates), _PAGE):
                page = [(key.tenant, key.digest) for key in candidates[begin : begin + _PAGE]]
                rows = connection.execute(
                    select(versions.c.tenant, versions.c.digest).where(pair.in_(page))
                )
                kept.update(BlobKey(row.tenant, row.digest) for row in rows)
        return tuple(key for key in candidates if key not in kept)

    def unknown(self, keys: Collection[BlobKey]) -> tuple[BlobKey, ...]:
        """Those of ``keys``, at most a page of them, that have no row."""
        pairs = [(key.tenant, key.digest) for key in keys]
        statement = select(blobs.c.tenant, blobs.c.digest).where(
            tuple_(blobs.c.tenant, blobs.c.digest).in_(pairs)
        )
        with reading(self._engine) as connection:
            known = {BlobKey(row.tenant, row.digest) for row in connection.execute(statement)}
        return tuple(key for key in keys if key not in known)

    def is_corrupt(self, key: BlobKey) -> bool:
        """Whether the blob was marked corrupt and not uploaded again since."""
        with reading(self._engine) as connection:
            statement = select(blobs.c.corrupt_at).where(_is(key))
            return connection.execute(statement).scalar() is not None

    def mark_corrupt(self, key: BlobKey, *, now: datetime) -> None:
        """Record that the blob's bytes are damaged."""
        with writing(self._engine) as connection:
            connection.execute(update(blobs).where(_is(key)).values(corrupt_at=now))

    def unreferenced(self, *, before: datetime) -> Iterator[tuple[BlobKey, int]]:
        """Blobs, with their sizes, that were last referenced or wanted before ``before``."""
        # In the order of the index with few entries: referenced blobs have null there.
        order = tuple_(blobs.c.unreferenced_at, blobs.c.tenant, blobs.c.digest)
        page = (
            select(blobs.c.unreferenced_at, blobs.c.tenant, blobs.c.digest, blobs.c.size_bytes)
            .where(blobs.c.unreferenced_at < before, ~_referenced())
            .order_by(blobs.c.unreferenced_at, blobs.c.tenant, blobs.c.digest)
            .limit(_PAGE)
        )
        statement = page
        while True:
            with reading(self._engine) as connection:
                rows = connection.execute(statement).all()
            for row in rows:
                yield BlobKey(row.tenant, row.digest), row.size_bytes
            if len(rows) < _PAGE:
                return
            last = rows[-1]
            statement = page.where(order > (last.unreferenced_at, last.tenant, last.digest))

    def collect(self, key: BlobKey, *, before: datetime, remove: Callable[[], None]) -> bool:
        """Remove one blob by ``remove``, and its row, unless a publish has wanted it since.

        The row is locked during the removal: a publish of the same bytes waits, and then finds no
        row.
        """
        idle = and_(_is(key), blobs.c.unreferenced_at < before)
        # Committed first: an interrupted removal may leave the row without its blob.
        with writing(self._engine) as connection:
            connection.execute(update(blobs).where(idle, ~_referenced()).values(ticket=None))
        with writing(self._engine) as connection:
            locked = connection.execute(
                select(blobs.c.digest).where(idle, blobs.c.ticket.is_(None)).with_for_update()
            ).first()
            # Queried again, now that the row is locked: the first result may be outdated.
            if (
                locked is None
                or connection.execute(select(blobs.c.digest).where(_is(key), _referenced())).first()
            ):
                return False
            remove()
            connection.execute(delete(blobs).where(_is(key)))
            return True


def _is(key: BlobKey) -> ColumnElement[bool]:
    return and_(blobs.c.tenant == key.tenant, blobs.c.digest == key.digest)


def _referenced() -> ColumnElement[bool]:
    return or_(
        *(
            exists().where(table.c.tenant == blobs.c.tenant, table.c.digest == blobs.c.digest)
            for table in (versions, files)
        )
    )
