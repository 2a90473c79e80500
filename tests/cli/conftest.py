"""Fixtures of the command-line tests."""

from pathlib import Path

import pytest

from prefixd.server.serve.settings import ENV_PREFIX, Settings
from tests.clients.conftest import _running, server

__all__ = ["_running", "clean_environment", "server"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings except a data folder; help is printed wide."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)
    monkeypatch.setenv("PREFIXD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
