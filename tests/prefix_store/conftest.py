"""A store on a directory, opened as often as a test likes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from store_home import Home

from prefix_store.blobs import LocalBlobs
from prefix_store.database import create_tables, open_database
from prefix_store.store import PrefixStore


@pytest.fixture
def open_home(tmp_path: Path) -> Iterator[Callable[[], Home]]:
    """Opens the same data directory again with every call, as after a restart."""
    engines: list[Engine] = []

    def open_it() -> Home:
        engine = open_database(f"sqlite:///{tmp_path}/data/catalog.sqlite")
        engines.append(engine)
        create_tables(engine)
        return Home(tmp_path, PrefixStore(engine, LocalBlobs(tmp_path / "data" / "blobs")))

    yield open_it
    for engine in engines:
        engine.dispose()


@pytest.fixture
def home(open_home: Callable[[], Home]) -> Home:
    return open_home()
