"""How often the members of a saved ensemble agreed with its answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, select

from prefixd.store.catalog.tables import agreements, prefixes, versions
from prefixd.store.db.database import insert_into


class Agreement(NamedTuple):
    """Of ``compared`` tokens (where log-probabilities are averaged) or answers (where members
    vote), those that the member alone would have given too."""

    agreed: int
    compared: int


def count(
    connection: Connection,
    *,
    tenant: str,
    name: str,
    version: int,
    agreed: Sequence[int],
    compared: int,
) -> None:
    """Add to the counts of each member of a version; of one that was deleted nothing is kept."""
    is_version = and_(prefixes.c.tenant == tenant, prefixes.c.name == name)
    statement = (
        select(versions.c.prefix_id)
        .join(prefixes, prefixes.c.id == versions.c.prefix_id)
        .where(is_version, versions.c.version == version)
    )
    prefix_id = connection.execute(statement).scalar_one_or_none()
    if prefix_id is None:
        return
    row: Any = insert_into(connection, agreements)
    added = {
        column: agreements.c[column] + row.excluded[column] for column in ("agreed", "compared")
    }
    key = list(agreements.primary_key)
    connection.execute(
        row.on_conflict_do_update(index_elements=key, set_=added),
        [
            {
                "prefix_id": prefix_id,
                "version": version,
                "member": member,
                "agreed": times,
                "compared": compared,
            }
            for member, times in enumerate(agreed)
        ],
    )


def read(connection: Connection, *, tenant: str, name: str, version: int) -> dict[int, Agreement]:
    """The counts of a version's members, by their place; those that were never counted are not in
    it."""
    statement = (
        select(agreements.c.member, agreements.c.agreed, agreements.c.compared)
        .join(prefixes, prefixes.c.id == agreements.c.prefix_id)
        .where(
            prefixes.c.tenant == tenant,
            prefixes.c.name == name,
            agreements.c.version == version,
        )
    )
    return {
        row.member: Agreement(row.agreed, row.compared) for row in connection.execute(statement)
    }
