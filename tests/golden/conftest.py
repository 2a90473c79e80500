"""Golden tests use tiny random models; nothing is downloaded."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.golden.golden_harness import Served, serve


@pytest.fixture
def serving() -> Iterator[Callable[..., Served]]:
    """``serving(model, **options)`` starts an engine that is stopped at the end of the test."""
    started: list[Served] = []

    def start(model: Any, **options: Any) -> Served:
        started.append(serve(model, **options))
        return started[-1]

    yield start
    for served in started:
        served.close()
