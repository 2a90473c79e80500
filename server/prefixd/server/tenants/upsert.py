"""INSERT … ON CONFLICT, which SQLite and PostgreSQL have and SQL has not."""

from collections.abc import Iterable
from typing import Any, cast

from sqlalchemy import Connection, Insert, Table
from sqlalchemy.dialects import postgresql, sqlite


def upsert(connection: Connection, table: Table, *, update: Iterable[str]) -> Insert:
    """An insert that, where the primary key is there already, sets the columns ``update`` to the
    new values instead; none named leaves the row as it is."""
    names = tuple(update)
    statement: Any
    if connection.dialect.name == "postgresql":
        statement = postgresql.insert(table)
    else:
        statement = sqlite.insert(table)
    if not names:
        return cast("Insert", statement.on_conflict_do_nothing())
    changed = {name: statement.excluded[name] for name in names}
    key = list(table.primary_key)
    return cast("Insert", statement.on_conflict_do_update(index_elements=key, set_=changed))
