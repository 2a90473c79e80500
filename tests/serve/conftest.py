"""Fixtures of the tests around a server process: those of the API tests."""

from tests.api.conftest import client, world

__all__ = ["client", "world"]
