"""The one database: how it is opened, how reads and writes begin, and its shared MetaData.

The catalog keeps its tables here, and so does whoever else needs the same durability (tenants and
their API keys): they add theirs to ``metadata``, with a step in ``migrations``, and use
``reading`` and ``writing``.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, DateTime, Dialect, Engine, MetaData, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

from prefixd.store.blobs.durable import make_directories

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another one, in this process or the next, before it fails."""

metadata = MetaData(
    # Fixed names, so that a migration can address a constraint it has to change.
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, kept in UTC: SQLite would forget the zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware to naive UTC."""
        del dialect
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a naive datetime cannot be stored: {value!r}")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Naive UTC to aware."""
        del dialect
        return None if value is None else value.replace(tzinfo=UTC)


def open_database(url: str) -> Engine:
    """An engine on ``url``, safe to share between threads: ``sqlite:///path/to/file`` or
    ``postgresql://user@host/name``.

    SQLite runs in WAL mode with ``synchronous=FULL`` (NORMAL may lose acknowledged commits when
    the power fails), foreign keys on, and a busy timeout, so that a server and a command line may
    use one file at once. Makes the directory of the file, but no tables: see ``create_tables``.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        # Whatever driver SQLAlchemy prefers: this is the one that is tested.
        tested = parsed.set(drivername="postgresql+psycopg")
        return create_engine(tested, pool_pre_ping=True, hide_parameters=True)
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"expected a database of sqlite or postgresql, got {parsed.drivername}")
    make_directories(_sqlite_file(parsed).parent)
    # Parameters hold users' names and templates: no error message, and so no log, shows them.
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def create_tables(engine: Engine) -> None:
    """Make the tables, or bring those of an earlier version up to date; see
    ``prefixd.store.db.migrate.upgrade``."""
    # The steps need what is in this file.
    from prefixd.store.db.migrate import upgrade  # noqa: PLC0415

    upgrade(engine)


def reading(engine: Engine) -> AbstractContextManager[Connection]:
    """A transaction that only reads: one consistent snapshot, never waiting for a writer."""
    if engine.dialect.name == "postgresql":
        # Its default gives every statement a snapshot of its own.
        return engine.execution_options(isolation_level="REPEATABLE READ").begin()
    return engine.begin()


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes, committed at the end of the block, rolled back by an exception.

    On SQLite it takes the write lock at once (BEGIN IMMEDIATE): a reader that turns writer half
    way fails at once when another wrote meanwhile, however long the busy timeout.
    """
    with engine.execution_options(prefixd_write=True).begin() as connection:
        yield connection


def insert_into(connection: Connection, table: Table) -> "sqlite.Insert | postgresql.Insert":
    """An INSERT that can say ON CONFLICT: how writers that race for one key stay free of errors."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def _sqlite_file(url: URL) -> Path:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ValueError(f"SQLite needs a file that several connections can share; got {url}")
    return Path(url.database)


def _prepare_sqlite(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    del record
    # The driver must not begin transactions by itself: ``_begin_sqlite`` does.
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    try:
        _switch_to_wal(cursor)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
    finally:
        cursor.close()


def _switch_to_wal(cursor: DBAPICursor) -> None:
    """Switching a new file to WAL ignores the busy timeout, so processes that start together
    would fail each other: wait here."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("prefixd_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
