"""The one database: opening it, read and write transactions, and the shared MetaData.

The catalog and the tenants define their tables on ``metadata``; ``migrations`` creates and changes
the tables of both. This package imports neither.
"""

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from sqlalchemy import (
    Connection,
    DateTime,
    Dialect,
    Engine,
    Insert,
    MetaData,
    Table,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

from prefixd.store.db.timeouts import Timeouts
from prefixd.store.db.writer_turns import WriterTurns
from prefixd.store.faults import storage_fault
from prefixd.store.files import make_directories

COMMAND_LINE_TIMEOUTS = Timeouts()
"""For calls outside a request."""

_TURNS = "prefixd_turns"


metadata = MetaData(
    # Fixed names, so that a migration can name the constraint it changes.
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def utc_now() -> datetime:
    """The default clock."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored in UTC: SQLite does not store the zone."""

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


def open_database(url: str, timeouts: Timeouts = COMMAND_LINE_TIMEOUTS) -> Engine:
    """An engine on ``url``, safe to share between threads: ``sqlite:///path/to/file`` or
    ``postgresql://user@host/name``.

    SQLite runs in WAL mode with ``synchronous=FULL`` (NORMAL may lose acknowledged commits when
    the power fails), foreign keys on, and a busy timeout, so that a server and a command line may
    use one file at once. Makes the directory of the file, but no tables: see ``migrate.upgrade``.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        from prefixd.store.db.postgres import open_postgres  # noqa: PLC0415 - psycopg is an extra

        engine = open_postgres(parsed, timeouts)
        event.listen(engine, "begin", _begin_postgresql)
        return engine
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"expected a database of sqlite or postgresql, got {parsed.drivername}")
    make_directories(_sqlite_file(parsed).parent)
    # Parameters hold users' names and templates, which must not reach an error message or a log.
    engine = create_engine(
        parsed,
        connect_args={"timeout": timeouts.lock_s},
        pool_timeout=timeouts.pool_s,
        pool_size=timeouts.max_connections,
        max_overflow=0,
        hide_parameters=True,
        execution_options={_TURNS: WriterTurns(timeouts.lock_s)},
    )
    event.listen(engine, "connect", partial(_prepare_sqlite, busy_timeout_s=timeouts.lock_s))
    event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "handle_error", _replace_read_only)
    return engine


def reading(engine: Engine) -> AbstractContextManager[Connection]:
    """A read-only transaction: one consistent snapshot, which never waits for a writer."""
    if engine.dialect.name == "postgresql":
        # PostgreSQL's default takes a new snapshot for every statement.
        return engine.execution_options(isolation_level="REPEATABLE READ").begin()
    return engine.begin()


def single_reads(engine: Engine) -> Engine:
    """``engine`` for connections that read with one statement each, which is a snapshot by itself:
    they begin no transaction. To be made once, not for each read."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    return engine.execution_options(prefixd_single=True)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes, committed at the end of the block, rolled back by an exception.

    On SQLite it takes the write lock first (BEGIN IMMEDIATE): a transaction that reads and then
    writes fails, without the busy timeout, when another one wrote in between.
    """
    with (
        _turn(engine, relaxed=False),
        engine.execution_options(prefixd_write=True).begin() as connection,
    ):
        yield connection


@contextmanager
def writing_relaxed(engine: Engine) -> Iterator[Connection]:
    """As ``writing``, but its commit does not wait for the disk: a power failure may undo the last
    of them, a killed process or server none. For counts, never for what a response
    acknowledges.

    The commit of a later ``writing`` makes those before it durable too, as both share one log.
    """
    options: dict[str, Any] = {"prefixd_write": True, "prefixd_relaxed": True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "AUTOCOMMIT"  # ``_begin_postgresql`` begins the transaction
    with _turn(engine, relaxed=True), engine.execution_options(**options).begin() as connection:
        yield connection


def _turn(engine: Engine, *, relaxed: bool) -> AbstractContextManager[None]:
    """On SQLite, wait for the other writers of this process."""
    turns: WriterTurns | None = engine.get_execution_options().get(_TURNS)
    return nullcontext() if turns is None else turns.take(relaxed=relaxed)


def check_readable(engine: Engine) -> None:
    """Read from the database. Raises SQLAlchemyError when it cannot be read now."""
    # SQLite opens no file for a query without a table.
    statement = "SELECT 1" if engine.dialect.name == "postgresql" else "SELECT 1 FROM sqlite_schema"
    with engine.begin() as connection:
        connection.exec_driver_sql(statement).first()


def check_writable(engine: Engine) -> None:
    """Take SQLite's write lock, and write nothing. Raises SQLAlchemyError when another process has
    it. PostgreSQL has no such lock."""
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            connection.rollback()


def insert_into(connection: Connection, table: Table) -> "sqlite.Insert | postgresql.Insert":
    """An INSERT with ON CONFLICT, so that concurrent writers of one key do not fail."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def upsert(connection: Connection, table: Table, *, update: Iterable[str]) -> Insert:
    """An INSERT that sets the columns ``update`` of an existing row with the same primary key; with
    no columns the existing row is kept as it is."""
    statement: Any = insert_into(connection, table)
    changed = {name: statement.excluded[name] for name in update}
    if not changed:
        return cast("Insert", statement.on_conflict_do_nothing())
    key = list(table.primary_key)
    return cast("Insert", statement.on_conflict_do_update(index_elements=key, set_=changed))


def _sqlite_file(url: URL) -> Path:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ValueError(f"SQLite needs a file that several connections can share; got {url}")
    return Path(url.database)


def _prepare_sqlite(
    dbapi_connection: DBAPIConnection, _record: ConnectionPoolEntry, *, busy_timeout_s: float
) -> None:
    # ``_begin_sqlite`` begins the transactions, not the driver.
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    try:
        _switch_to_wal(cursor, busy_timeout_s)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
    finally:
        cursor.close()


def _replace_read_only(context: ExceptionContext) -> None:
    """Close a connection that was opened while the disk was read-only: SQLite opened the file for
    reading, and that connection cannot write when the disk can be written again."""
    if getattr(context.original_exception, "sqlite_errorname", "").startswith("SQLITE_READONLY"):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False  # the others may be able to write


def _switch_to_wal(cursor: DBAPICursor, busy_timeout_s: float) -> None:
    """Switch to WAL, and retry for ``busy_timeout_s``: switching a new file ignores the busy
    timeout, so processes that start together would fail."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if storage_fault(error) is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("prefixd_single", False):
        return
    if not options.get("prefixd_write", False):
        connection.exec_driver_sql("BEGIN")
        return
    # In WAL mode NORMAL leaves out only the fsync of a commit, not those of a checkpoint. It cannot
    # be set within a transaction, so each one that writes sets what it needs, if the last one
    # needed other.
    synchronous = "NORMAL" if options.get("prefixd_relaxed", False) else "FULL"
    if connection.info.get("synchronous") != synchronous:
        connection.exec_driver_sql(f"PRAGMA synchronous={synchronous}")
        connection.info["synchronous"] = synchronous
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("prefixd_relaxed", False):
        # In one message: as many round trips as the BEGIN of the driver takes.
        connection.exec_driver_sql("BEGIN; SET LOCAL synchronous_commit = off")
