"""Transactions that wait for the disk, and those that do not."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text

from prefixd.store.db.database import open_database, reading, writing, writing_relaxed

FULL, NORMAL = 2, 1  # SQLite's levels


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path / 'catalog.sqlite3'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    engine = open_database(url)
    with writing(engine) as connection:
        connection.execute(text("CREATE TABLE numbers (number INTEGER)"))
    yield engine
    engine.dispose()


def waits_for_the_disk(connection: Connection) -> bool:
    if connection.dialect.name == "sqlite":
        return bool(connection.scalar(text("PRAGMA synchronous")) == FULL)
    return bool(connection.scalar(text("SHOW synchronous_commit")) != "off")


def add(connection: Connection, number: int) -> None:
    connection.execute(text("INSERT INTO numbers VALUES (:number)"), {"number": number})


def numbers(engine: Engine) -> list[int]:
    with reading(engine) as connection:
        return list(connection.scalars(text("SELECT number FROM numbers ORDER BY number")))


@pytest.fixture
def durable(database: Engine) -> Callable[[], bool]:
    """Whether an ordinary transaction waits for the disk."""
    if database.dialect.name == "postgresql":
        with database.connect() as connection:
            name = connection.scalar(text("SELECT current_database()"))
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f'ALTER DATABASE "{name}" SET synchronous_commit = on'))
        database.dispose()

    def check() -> bool:
        with writing(database) as connection:
            return waits_for_the_disk(connection)

    return check


def test_only_a_relaxed_transaction_does_not_wait_for_the_disk(
    database: Engine, durable: Callable[[], bool]
) -> None:
    for number in range(10):  # on one connection: the pool returns it each time
        with writing_relaxed(database) as connection:
            add(connection, number)
            assert not waits_for_the_disk(connection)
        assert durable()
    assert numbers(database) == list(range(10))


def test_a_relaxed_transaction_that_fails_is_undone_and_leaves_no_trace(
    database: Engine, durable: Callable[[], bool]
) -> None:
    for statement in ("INSERT INTO numbers VALUES (7)", "SELECT * FROM nothing"):
        with suppress(Exception), writing_relaxed(database) as connection:
            add(connection, 3)
            connection.execute(text(statement))
            raise KeyError
        assert durable()
    assert numbers(database) == []
