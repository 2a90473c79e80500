"""Rows that point at a version: aliases, and the ``latest`` of each base."""

from dataclasses import dataclass

from sqlalchemy import Column, Connection, and_, delete, func, select, update

from prefixd.store.catalog.tables import latest_versions, versions
from prefixd.store.db.database import upsert


@dataclass(frozen=True, slots=True)
class Pointed:
    """The version that an alias or a ``latest`` points at, the revision of the pointing row, and
    that of the version."""

    version: int
    revision: int
    version_revision: int


def pointed(
    connection: Connection, key: Column[str], value: str, *, prefix_id: int
) -> Pointed | None:
    """Where the alias or the ``latest`` whose column ``key`` is ``value`` points; None: it does not
    exist."""
    table = key.table
    same = and_(versions.c.prefix_id == table.c.prefix_id, versions.c.version == table.c.version)
    statement = (
        select(table.c.version, table.c.revision, versions.c.revision.label("version_revision"))
        .join_from(table, versions, same)
        .where(table.c.prefix_id == prefix_id, key == value)
    )
    row = connection.execute(statement).first()
    return None if row is None else Pointed(row.version, row.revision, row.version_revision)


def point(
    connection: Connection,
    key: Column[str],
    value: str,
    *,
    prefix_id: int,
    version: int,
    revision: int,
) -> None:
    """Point the alias or the ``latest`` whose column ``key`` is ``value`` at a version."""
    row = {"prefix_id": prefix_id, key.name: value, "version": version, "revision": revision}
    statement = upsert(connection, key.table, update=("version", "revision"))
    connection.execute(statement.values(row))


def highest_left(
    connection: Connection, prefix_id: int, *, without: int, fingerprint: str | None = None
) -> int | None:
    """The highest version of a prefix but ``without``, of one base or of any; None: there is no
    other."""
    statement = select(func.max(versions.c.version)).where(
        versions.c.prefix_id == prefix_id, versions.c.version != without
    )
    if fingerprint is not None:
        statement = statement.where(versions.c.fingerprint == fingerprint)
    highest: int | None = connection.execute(statement).scalar()
    return highest


def replace_latest(
    connection: Connection, prefix_id: int, fingerprint: str, version: int | None, *, revision: int
) -> None:
    """Point the ``latest`` of a base at another version, or with None remove it."""
    of_base = and_(
        latest_versions.c.prefix_id == prefix_id, latest_versions.c.fingerprint == fingerprint
    )
    if version is None:
        connection.execute(delete(latest_versions).where(of_base))
    else:
        moved = {"version": version, "revision": revision}
        connection.execute(update(latest_versions).where(of_base).values(moved))
