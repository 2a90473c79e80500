"""The server under test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from api_world import World, make_world
from fastapi.testclient import TestClient

# Through the standard library, whose level hides the access log from the tests' output.
structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as world:
        yield world


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    """A client with acme's key; the engine runs."""
    with TestClient(world.app, headers=world.headers()) as client:
        yield client
