"""The catalog under test, on both databases."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from prefixd.server.tenants.registry import Tenants
from prefixd.store.db.database import open_database
from tests.migrated import migrated
from tests.tenants.tenants_clock import Clock


@pytest.fixture(params=["sqlite", "postgres"])
def open_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    """Opens one catalog several times, as replicas do."""
    opened: list[Engine] = []
    if request.param == "sqlite":
        url = migrated(tmp_path / "catalog.sqlite3")
    else:
        url = request.getfixturevalue("postgres_catalog_url")

    def make() -> Engine:
        opened.append(open_database(url))
        return opened[-1]

    yield make
    for engine in opened:
        engine.dispose()


@pytest.fixture
def engine(open_engine: Callable[[], Engine]) -> Engine:
    return open_engine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tenants(engine: Engine, clock: Clock) -> Tenants:
    return Tenants(engine, now=clock)
