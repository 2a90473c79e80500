"""The folder of the tiny model, created once in a run."""

from pathlib import Path

import pytest

from tests.faults.faults_model import TINY, save_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random Llama, ready to serve."""
    return save_model(tmp_path_factory.mktemp("model") / TINY)
