"""The catalog's rows of blobs: which may be there, since when nothing has them, which are corrupt.

::

    (no row) --want--> unreferenced_at = now --claim--> unreferenced_at = null
        ^                   |         ^                         |
        +-----collect-------+         +---release, at the last--+

``want`` commits before the blob is written, ``claim`` in the transaction of the version, and
``collect`` removes blob and row under the row's lock. So whoever publishes either finds the row
and keeps the blob, or finds none and starts over; a blob is never removed beneath a version.

A row that is there need not be the row that was wanted: it may have gone, and its blob with it, and
another publish, still to write the blob, made it anew. The row's ticket tells: all who want a blob
share it, ``claim`` asks for it, and ``collect`` commits that it is void before it removes anything.
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
    select,
    tuple_,
    update,
)

from prefixd.store.catalog.tables import blobs, versions
from prefixd.store.db.database import insert_into, reading, writing
from prefixd.store.digest import BlobKey

_PAGE = 500


class BlobCollected(Exception):
    """A collection came to a blob while a publish was on its way: begin again."""


def claim(connection: Connection, key: BlobKey, *, ticket: str) -> None:
    """A version has this blob from now on, and its bytes were just verified.

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
    """Versions with these blobs went; mark those that no other version has.

    The row is locked before it is asked who has the blob: of two that remove the last two versions
    at once, the second waits for the first, and finds itself the last.
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
        """Note a blob that is about to be written: from here on collecting spares it for its grace.

        Gives the ticket to ``claim`` it with.
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
            noted = row.on_conflict_do_update(
                index_elements=["tenant", "digest"],
                set_={
                    "unreferenced_at": case((blobs.c.unreferenced_at.is_not(None), now)),
                    "ticket": func.coalesce(blobs.c.ticket, fresh),
                },
            )
            ticket: str = connection.execute(noted.returning(blobs.c.ticket)).scalar_one()
            return ticket

    def adopt(self, found: Sequence[tuple[BlobKey, int]], *, now: datetime) -> int:
        """Make rows for blobs (with their sizes) that have none, unreferenced; how many."""
        adopted = 0
        with writing(self._engine) as connection:
            for key, size_bytes in found:
                row = insert_into(connection, blobs).values(
                    tenant=key.tenant, digest=key.digest, size_bytes=size_bytes, unreferenced_at=now
                )
                made = row.on_conflict_do_nothing(index_elements=["tenant", "digest"])
                # Returned rows are counted, as an insert's rowcount is -1 with some drivers.
                adopted += len(connection.execute(made.returning(blobs.c.digest)).all())
        return adopted

    def touch(self, keys: Collection[BlobKey], *, now: datetime) -> None:
        """These are in use: those that nothing references begin their grace again."""
        with writing(self._engine) as connection:
            for key in sorted(keys):
                connection.execute(
                    update(blobs)
                    .where(_is(key), blobs.c.unreferenced_at < now)
                    .values(unreferenced_at=now)
                )

    def is_referenced(self, key: BlobKey) -> bool:
        """Whether a version has this blob."""
        found = select(versions.c.version).where(
            versions.c.tenant == key.tenant, versions.c.digest == key.digest
        )
        with reading(self._engine) as connection:
            return connection.execute(found.limit(1)).first() is not None

    def deleted(self, keys: Collection[BlobKey]) -> tuple[BlobKey, ...]:
        """Those of ``keys`` that no version has any more."""
        left, kept = sorted(keys), set[BlobKey]()
        pair = tuple_(versions.c.tenant, versions.c.digest)
        with reading(self._engine) as connection:
            for begin in range(0, len(left), _PAGE):
                page = [(key.tenant, key.digest) for key in left[begin : begin + _PAGE]]
                found = connection.execute(
                    select(versions.c.tenant, versions.c.digest).where(pair.in_(page))
                )
                kept.update(BlobKey(row.tenant, row.digest) for row in found)
        return tuple(key for key in left if key not in kept)

    def is_corrupt(self, key: BlobKey) -> bool:
        """Whether the blob was found corrupt and not uploaded again since."""
        with reading(self._engine) as connection:
            found = select(blobs.c.corrupt_at).where(_is(key))
            return connection.execute(found).scalar() is not None

    def mark_corrupt(self, key: BlobKey, *, now: datetime) -> None:
        """Note that the blob's bytes are not what they were."""
        with writing(self._engine) as connection:
            connection.execute(update(blobs).where(_is(key)).values(corrupt_at=now))

    def unreferenced(self, *, before: datetime) -> Iterator[tuple[BlobKey, int]]:
        """Blobs, with their sizes, that nothing has referenced or wanted since ``before``."""
        # In the order of the one index whose entries are few: all other blobs have null there.
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
                found = connection.execute(statement).all()
            for row in found:
                yield BlobKey(row.tenant, row.digest), row.size_bytes
            if len(found) < _PAGE:
                return
            last = found[-1]
            statement = page.where(order > (last.unreferenced_at, last.tenant, last.digest))

    def collect(self, key: BlobKey, *, before: datetime, remove: Callable[[], None]) -> bool:
        """Remove one blob by ``remove``, and its row, unless something wants it by now.

        The row stays locked meanwhile: a publish of the same bytes waits, and then finds no row.
        """
        idle = and_(_is(key), blobs.c.unreferenced_at < before)
        # Committed first: where the removal is cut short, its row stays and its blob may be gone.
        with writing(self._engine) as connection:
            connection.execute(update(blobs).where(idle, ~_referenced()).values(ticket=None))
        with writing(self._engine) as connection:
            locked = connection.execute(
                select(blobs.c.digest).where(idle, blobs.c.ticket.is_(None)).with_for_update()
            ).first()
            # Asked again, now that the row is locked: the first answer may have been older.
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
    return exists().where(versions.c.tenant == blobs.c.tenant, versions.c.digest == blobs.c.digest)
