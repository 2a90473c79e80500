"""The folders of the tiny model, created once in a run."""

from pathlib import Path

import pytest

from tests.faults.faults_model import TINY, save_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random Llama, ready to serve."""
    return save_model(tmp_path_factory.mktemp("model") / TINY)


@pytest.fixture(scope="session")
def padded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base with words that its embeddings lack, and an end-of-text id that its logits
    lack: the tokenizer was extended and the model was not resized."""
    return save_model(tmp_path_factory.mktemp("padded") / TINY, extra_words=4, eos=(2, 500))
