"""The server under test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as world:
        yield world


@pytest.fixture(params=["sqlite", "postgres"])
def either_world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A world on SQLite and one on PostgreSQL, for tests that depend on their locks."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres_catalog_url")
    with make_world(tmp_path, database_url=url) as world:
        yield world


@pytest.fixture
def either_client(either_world: World) -> Iterator[TestClient]:
    """As ``client``."""
    with TestClient(either_world.app, headers=either_world.headers()) as client:
        yield client


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    """A client with acme's key; the engine runs."""
    with TestClient(world.app, headers=world.headers()) as client:
        yield client
