"""How much of an upload was sent, told while it is sent."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from prefixd.client import AsyncClient, Client
from prefixd.client.transport import PIECE
from prefixd.server.cli.progress import upload_bar
from tests.cli.cli_runner import run
from tests.clients.loopback import Loopback
from tests.clients.samples import MANIFEST

WEIGHTS = bytes(range(256)) * 1024


def send(url: str, kind: str, name: str, *args: Any, **kwargs: Any) -> None:
    """Call a method of a client of this kind."""

    async def ignore(_: float) -> None:
        pass

    async def asynchronously() -> None:
        async with AsyncClient(url, sleep=ignore) as client:
            await getattr(client, name)(*args, **kwargs)

    if kind == "async":
        anyio.run(asynchronously)
        return
    with Client(url, sleep=lambda _: None) as client:
        getattr(client, name)(*args, **kwargs)


def check(reports: list[tuple[int, int]], total: int) -> None:
    """From none to all bytes, in small steps."""
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert all(0 < after[0] - before[0] <= PIECE for before, after in pairwise(reports))
    assert len(reports) > total // PIECE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return tmp_path


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_upload_of_a_folder_reports_its_bytes_and_begins_again_with_a_retry(
    server: Loopback, folder: Path, kind: str
) -> None:
    server.reply({"error": {"message": "full", "code": "overloaded"}}, status=503)
    server.reply(MANIFEST)
    tries: list[list[tuple[int, int]]] = []

    def report(sent: int, total: int) -> None:
        if sent == 0:
            tries.append([])
        tries[-1].append((sent, total))

    send(server.url, kind, "upload_folder", "triage", folder, progress=report)
    assert len(tries) == len(server.seen) == 2
    for seen, reports in zip(server.seen, tries, strict=True):
        assert seen.parts["weights"] == WEIGHTS
        check(reports, int(seen.headers["content-length"]))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_upload_of_a_stored_file_reports_its_bytes(server: Loopback, kind: str) -> None:
    server.reply(MANIFEST)
    reports: list[tuple[int, int]] = []

    def report(sent: int, total: int) -> None:
        reports.append((sent, total))

    send(server.url, kind, "upload_artifact", "triage", WEIGHTS, progress=report)
    assert server.seen[0].octets == WEIGHTS
    check(reports, len(WEIGHTS))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_is_drawn_on_a_terminal_alone() -> None:
    terminal, log = Terminal(), io.StringIO()
    with upload_bar(Console(file=terminal, force_terminal=True, width=80)) as progress:
        assert progress is not None
        progress(0, 2000)
        progress(1000, 2000)
    assert "1.0/2.0 kB" in terminal.getvalue()
    with upload_bar(Console(file=log, force_terminal=True)) as progress:
        assert progress is None
    assert log.getvalue() == ""


def test_push_draws_nothing_without_a_terminal(
    server: Loopback, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    server.reply(MANIFEST, status=201)
    result = run("prefix", "push", "triage", str(folder), "--url", server.url)
    assert result.stderr == ""
    assert result.stdout.startswith("triage@3  uploaded")
