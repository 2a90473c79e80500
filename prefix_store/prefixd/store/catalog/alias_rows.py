"""Rows that point at a version: aliases, and the ``latest`` of each base."""

from sqlalchemy import Column, Connection, and_, delete, func, select, update

from prefixd.store.catalog.tables import latest_versions, versions
from prefixd.store.db.database import upsert


def point(
    connection: Connection, key: Column[str], value: str, *, prefix_id: int, version: int
) -> int | None:
    """Point the alias or the ``latest`` whose column ``key`` is ``value`` at a version of a prefix;
    the version that it pointed at before."""
    table = key.table
    before: int | None = connection.execute(
        select(table.c.version).where(table.c.prefix_id == prefix_id, key == value)
    ).scalar()
    row = {"prefix_id": prefix_id, key.name: value, "version": version}
    connection.execute(upsert(connection, table, update=("version",)).values(row))
    return before


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
    connection: Connection, prefix_id: int, fingerprint: str, version: int | None
) -> None:
    """Point the ``latest`` of a base at another version, or with None remove it."""
    of_base = and_(
        latest_versions.c.prefix_id == prefix_id, latest_versions.c.fingerprint == fingerprint
    )
    if version is None:
        connection.execute(delete(latest_versions).where(of_base))
    else:
        connection.execute(update(latest_versions).where(of_base).values(version=version))
