"""``PREFIXD_*`` variables that nothing reads."""

import re
from pathlib import Path

import pytest

from prefixd.server.cli.variables import known_variables, unknown_variables
from tests.cli.cli_runner import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PREFIXD_MODLE", "PREFIXD_MODEL"),
        ("PREFIXD_KV_TOKEN", "PREFIXD_KV_TOKENS"),
        ("PREFIXD_DATABASE", "PREFIXD_DATABASE_URL"),
        ("PREFIXD_APIKEY", "PREFIXD_API_KEY"),
        ("prefixd_dtpye", "PREFIXD_DTYPE"),
    ],
)
def test_an_unknown_variable_is_reported_with_the_nearest_name(name: str, nearest: str) -> None:
    assert unknown_variables([name, "HOME", "MY_PREFIXD_X"]) == {name: nearest}


@pytest.mark.parametrize(
    "name",
    [
        "PREFIXD_MODEL",
        "prefixd_model",
        "PREFIXD_API_KEY",
        "PREFIXD_TARGET",
        "PREFIXD_TEST_ANYTHING",
        "PREFIXD_SERVICE_HOST",
        "PREFIXD_SERVICE_PORT_HTTP",
        "PREFIXD_PORT",
        "PREFIXD_PORT_8000_TCP_ADDR",
    ],
)
def test_variables_of_ours_and_of_kubernetes_are_known(name: str) -> None:
    assert unknown_variables([name]) == {}


def test_every_variable_that_the_repository_names_is_known() -> None:
    """In code, Compose, the Makefile and the pages."""
    files = [
        ROOT / "docker-compose.yml",
        ROOT / "Makefile",
        *(
            path
            for folder in ("docs", "docker", "benchmarks")
            for path in (ROOT / folder).rglob("*.*")
        ),
        *(path for path in (ROOT / "tests").rglob("*.py") if "cli" not in path.parts),
    ]
    text = "\n".join(path.read_text("utf-8", "ignore") for path in files)
    named = set(re.findall(r"\bPREFIXD_[A-Z0-9_]*[A-Z0-9]\b", text))
    assert len(named) > 40
    assert set(unknown_variables(named)) == set()
    assert len(known_variables()) == len(set(known_variables()))


def test_a_verb_warns_once_on_standard_error_without_the_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFIXD_MODLE", "s3cret")
    monkeypatch.setenv("PREFIXD_ZZ", "s3cret")
    result = run("tenant", "ls")
    lines = [line for line in result.stderr.splitlines() if "PREFIXD_MODLE" in line]
    assert len(lines) == 1
    assert "PREFIXD_MODLE (nearest: PREFIXD_MODEL)" in lines[0]
    assert "PREFIXD_ZZ (nearest: PREFIXD_" in lines[0]
    assert "s3cret" not in result.output
    assert "PREFIXD" not in result.stdout


def test_no_warning_without_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_SERVICE_HOST", "10.0.0.1")
    assert run("tenant", "ls").stderr == ""
