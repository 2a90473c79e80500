"""The interpreter's process is started once."""

from collections.abc import Iterator

import pytest

from tests.model.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running
