"""Fixtures of the client tests."""

from collections.abc import Iterator

import pytest

from tests.clients.loopback import Loopback, loopback


@pytest.fixture(scope="session")
def _running() -> Iterator[Loopback]:
    with loopback() as running:
        yield running


@pytest.fixture
def server(_running: Loopback) -> Iterator[Loopback]:
    _running.reset()
    yield _running
    assert not _running.replies, "the client sent fewer requests than the test expects"
