"""What launches the kernels is started once."""

from collections.abc import Iterator

import pytest

from tests.model.kernels.interpreter import DEVICE, Interpreter, OnDevice


@pytest.fixture(scope="session")
def kernels() -> Iterator[Interpreter | OnDevice]:
    if DEVICE != "cpu":
        yield OnDevice()
        return
    with Interpreter() as running:
        yield running
