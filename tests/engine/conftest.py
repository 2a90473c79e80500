"""Runs tests that use ``depth`` twice: with results at once, and one step behind."""

import pytest

from tests.engine.test_engine import Bench


@pytest.fixture(params=[0, 1], ids=["at once", "one behind"])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps in flight while the next one is planned, of every ``Bench``."""
    depth: int = request.param
    monkeypatch.setattr(Bench, "depth", depth)
    return depth
