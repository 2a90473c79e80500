"""What stays and what may go: pins, and blobs that no name means any more."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, func, or_, select, text

from prefixd.store.catalog.tables import aliases, blobs, pins, prefixes, versions
from prefixd.store.db.database import insert_into
from prefixd.store.digest import BlobKey

_BATCH = 500
_LOCK = 0x70696E73  # any number, but the same for all: "pins"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A blob that a pin names, and how many positions it takes."""

    key: BlobKey
    num_virtual_tokens: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a change left behind: blobs that no ``latest``, alias or pin of their tenant means any
    more, though a version may still have them; and whether pins changed."""

    orphans: tuple[BlobKey, ...] = ()
    pins: bool = False


def pinned(connection: Connection, *, fingerprint: str) -> tuple[Pinned, ...]:
    """What is pinned of the prefixes of one base, by all tenants, the oldest pin first; equal bytes
    once for a tenant. Corrupt blobs are not among it: they cannot be loaded."""
    statement = (
        select(pins.c.tenant, versions.c.digest, versions.c.num_virtual_tokens)
        .join_from(
            pins,
            versions,
            and_(versions.c.prefix_id == pins.c.prefix_id, versions.c.version == pins.c.version),
        )
        .outerjoin(
            blobs, and_(blobs.c.tenant == pins.c.tenant, blobs.c.digest == versions.c.digest)
        )
        .where(versions.c.fingerprint == fingerprint, blobs.c.corrupt_at.is_(None))
        .group_by(pins.c.tenant, versions.c.digest, versions.c.num_virtual_tokens)
        .order_by(func.min(pins.c.since), pins.c.tenant, versions.c.digest)
    )
    return tuple(
        Pinned(BlobKey(row.tenant, row.digest), row.num_virtual_tokens)
        for row in connection.execute(statement)
    )


def put_pin(
    connection: Connection, tenant: str, prefix_id: int, version: int, **noted: object
) -> None:
    """Pin a version in place of the one of its prefix that was.

    From here to the end of the transaction nobody else pins: of two at once, the second counts the
    first's.
    """
    if connection.dialect.name == "postgresql":  # SQLite has but one writer
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    row = {"version": version, **noted}
    made = insert_into(connection, pins).values(tenant=tenant, prefix_id=prefix_id, **row)
    connection.execute(made.on_conflict_do_update(index_elements=["tenant", "prefix_id"], set_=row))


def drop_pin(connection: Connection, tenant: str, prefix_id: int | None) -> bool:
    """Forget the pin of a prefix; whether there was one."""
    gone = delete(pins).where(pins.c.tenant == tenant, pins.c.prefix_id == prefix_id)
    return connection.execute(gone).rowcount > 0


def pinned_version(connection: Connection, tenant: str, prefix_id: int | None) -> int | None:
    """Which version of a prefix is pinned."""
    found = select(pins.c.version).where(pins.c.tenant == tenant, pins.c.prefix_id == prefix_id)
    return connection.execute(found).scalar()


def digests_of(connection: Connection, prefix_id: int, numbers: Iterable[int | None]) -> list[str]:
    """Digests of some versions of a prefix."""
    wanted = [number for number in numbers if number is not None]
    found = select(versions.c.digest).where(
        versions.c.prefix_id == prefix_id, versions.c.version.in_(wanted)
    )
    return list(connection.execute(found).scalars())


def orphans(connection: Connection, tenant: str, digests: Collection[str]) -> tuple[BlobKey, ...]:
    """Those of ``digests`` that no ``latest``, alias or pin of the tenant means."""
    left = sorted(set(digests))
    meant: set[str] = set()
    for begin in range(0, len(left), _BATCH):
        meant.update(_meant(connection, tenant, left[begin : begin + _BATCH]))
    return tuple(BlobKey(tenant, digest) for digest in left if digest not in meant)


def _meant(connection: Connection, tenant: str, digests: Collection[str]) -> Iterable[str]:
    def same(table: Table) -> ColumnElement[bool]:
        return and_(
            table.c.prefix_id == versions.c.prefix_id, table.c.version == versions.c.version
        )

    return connection.execute(
        select(versions.c.digest)
        .join_from(versions, prefixes, prefixes.c.id == versions.c.prefix_id)
        .outerjoin(aliases, same(aliases))
        .outerjoin(pins, same(pins))
        .where(versions.c.tenant == tenant, versions.c.digest.in_(digests))
        .where(
            or_(
                versions.c.version == prefixes.c.latest_version,
                aliases.c.alias.is_not(None),
                pins.c.since.is_not(None),
            )
        )
    ).scalars()
