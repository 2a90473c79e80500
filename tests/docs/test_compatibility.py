"""docs/compatibility.md has the results of the clients, and those of all their calls."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.compat import lm_harness, report
from tests.compat.clients import BEGIN, CLIENTS, END, HERE, PAGE, RESULTS, table

THIRD_PARTY = (
    "aiohttp",
    "anthropic",
    "instructor",
    "langchain_core.messages",
    "langchain_openai",
    "llama_index.core.llms",
    "llama_index.core.tools",
    "llama_index.llms.openai_like",
    "openai",
    "pydantic_ai",
    "pydantic_ai.models.openai",
    "pydantic_ai.providers.openai",
)


class Recorder(report.Report):
    """Takes the calls of a script without running them."""

    calls: list[str]

    def __init__(self, package: str = "", *, version: str = "") -> None:
        self.url = self.key = self.model = self.version = ""
        type(self).calls = []

    def call(self, name: str, check: Callable[[], object]) -> None:
        self.calls.append(name)

    def end(self) -> None: ...


def calls_of(script: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls in a script."""
    if script.suffix == ".mjs":
        return re.findall(r'await call\(version, "(.+?)"', script.read_text())
    packages: list[tuple[str, Any]] = [(name, MagicMock()) for name in THIRD_PARTY]
    monkeypatch.setattr(report, "Report", Recorder)
    for name, module in [*packages, ("report", report)]:
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(script))
    return Recorder.calls


def test_table_is_that_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(results)
    assert not [row for rows in results.values() for row in rows if not row["ok"]]


def test_results_have_each_call_of_each_script(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {
        client.title: calls_of(HERE / client.script, monkeypatch) for client in CLIENTS.values()
    }
    calls[lm_harness.TITLE] = list(map(lm_harness.call_of, lm_harness.PREFIXES))
    results = json.loads(RESULTS.read_text())
    assert {title: [row["call"] for row in rows] for title, rows in results.items()} == calls
    assert all(calls.values())
