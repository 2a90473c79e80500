"""Revisions of prefixes and of what belongs to them.

``prefixes.revision`` counts the writes to a prefix, under the lock of its row. The versions, alias
or ``latest`` that a write changes take the new count as their own revision.
"""

from collections.abc import Iterable

from sqlalchemy import Connection, update

from prefixd.store.catalog.tables import prefixes, versions


def raise_revision(connection: Connection, prefix_id: int) -> int:
    """Count one more write to a prefix; the new revision."""
    statement = (
        update(prefixes)
        .where(prefixes.c.id == prefix_id)
        .values(revision=prefixes.c.revision + 1)
        .returning(prefixes.c.revision)
    )
    revision: int = connection.execute(statement).scalar_one()
    return revision


def mark_versions(
    connection: Connection, prefix_id: int, numbers: Iterable[int | None], *, revision: int
) -> None:
    """Give ``revision`` to versions whose manifest changed; None among them is no version."""
    changed = sorted({number for number in numbers if number is not None})
    in_prefix = versions.c.prefix_id == prefix_id
    connection.execute(
        update(versions).where(in_prefix, versions.c.version.in_(changed)).values(revision=revision)
    )
