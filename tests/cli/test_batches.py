"""``prefixd batch``, and the client's operations on files and batches, against the real application
with a fake model."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from prefixd.client import AsyncClient, Batch, Client, errors
from prefixd.client.operations import Operations
from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.cli import batches as verbs
from prefixd.server.cli.progress import line_bar
from tests.api.api_batches import line
from tests.api.api_world import World, fake_text, make_world
from tests.cli.served_shell import Shell, shell
from tests.clients.loopback import serving

__all__ = ["shell"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as world:
        app = world.make_app(batch_options=BatchOptions(max_lines=4))
        with serving(app) as url:
            yield world, url


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, *prompts: str, **body: object) -> Path:
    file = folder / "asks.jsonl"
    file.write_bytes(b"".join(line(prompt, {"prompt": prompt, **body}) for prompt in prompts))
    return file


def objects(file: Path) -> list[Any]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_run_writes_the_answers_in_the_order_of_the_file(shell: Shell, folder: Path) -> None:
    file = write(folder, "a", "b", "c")
    shown = shell("batch", "run", file)
    answers = objects(folder / "asks.output.jsonl")
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c"]
    texts = [answer["response"]["body"]["choices"][0]["text"] for answer in answers]
    assert texts == [fake_text(None, prompt, 4) for prompt in "abc"]
    assert "completed                3" in shown.stdout
    assert "asks.output.jsonl" in shown.stdout
    assert not list(folder.glob("*.partial"))
    assert "exists" in shell("batch", "run", file, code=1).stderr


def test_a_line_that_is_not_unicode_goes_to_the_server_as_it_is(shell: Shell, folder: Path) -> None:
    """Half of a surrogate pair; the server says what is wrong with it."""
    file = folder / "in.jsonl"
    file.write_bytes(line("a", {"prompt": "x"}) + line("b", {"prompt": "\ud800"}))
    batch = shell.json("batch", "run", file, "--model", "tiny", "--out", "o.jsonl", code=1)
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}


def test_lines_without_a_model_get_that_of_the_option(shell: Shell, folder: Path) -> None:
    file = folder / "asks.jsonl"
    bodies = [{"prompt": "x", "max_tokens": 1}, {"prompt": "x", "model": "none"}]
    fields = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": str(n), "body": body, **fields} for n, body in enumerate(bodies)]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    batch = shell.json("batch", "run", file, "--model", "tiny", "--out", "o.jsonl", code=1)
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (error,) = objects(folder / "o.jsonl.errors")
    assert error["response"]["body"]["error"]["code"] == "model_not_found"


def test_an_invalid_file_is_reported_with_its_lines(shell: Shell, folder: Path) -> None:
    file = write(folder, "a", "a")
    failed = shell("batch", "run", file, code=1)
    assert "line 2: expected each custom_id once" in failed.stderr
    assert "(duplicate_custom_id)" in failed.stderr
    assert not (folder / "asks.output.jsonl").exists()


def test_a_file_without_a_url_is_refused_before_it_is_sent(shell: Shell, folder: Path) -> None:
    file = folder / "x.jsonl"
    for text, words in (("", "no lines"), ("{}\n", "--endpoint")):
        file.write_text(text)
        assert words in shell("batch", "run", file, code=1).stderr


def test_a_batch_is_listed_shown_waited_for_and_cancelled(shell: Shell, folder: Path) -> None:
    uploaded = shell.client.upload_file(write(folder, "a").read_bytes())
    created = shell.client.create_batch(uploaded.id, endpoint="/v1/completions")
    shell("batch", "wait", created.id, "--out", "x.jsonl")
    assert len((folder / "x.jsonl").read_text().splitlines()) == 1
    listed = shell("batch", "ls").stdout.splitlines()
    assert listed[0].split() == ["ID", "STATUS", "ENDPOINT", "LINES", "CREATED"]
    assert listed[1].split()[:4] == [created.id, "completed", "/v1/completions", "1/1"]
    assert shell.json("batch", "ls")[0]["id"] == created.id
    assert shell.json("batch", "show", created.id)["status"] == "completed"
    assert "completed" in shell("batch", "show", created.id).stdout
    refused = shell("batch", "cancel", created.id, code=1)
    assert "can be cancelled while it is validating or in_progress" in refused.stderr


def test_ctrl_c_leaves_the_batch_running_and_says_how_to_go_on(
    shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixd.server.cli.batches.sleep", interrupted)
    ended = shell("batch", "run", write(folder, "a"), code=130)
    batch_id = shell.client.list_batches(limit=1).batches[0].id
    assert f"prefixd batch wait {batch_id} --out asks.output.jsonl" in ended.stderr
    assert f"prefixd batch cancel {batch_id}" in ended.stderr
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    shell("batch", "wait", batch_id)
    assert (folder / f"{batch_id}.output.jsonl").exists()


@pytest.mark.parametrize("outage", [300.0, -1.0])
def test_waiting_outlasts_a_restart_of_the_server(
    shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch, outage: float
) -> None:
    failures = iter([errors.ConnectError("refused"), errors.UnavailableError("busy", status=503)])
    show: Any = vars(Operations)["show_batch"]

    def failing(client: Client, batch_id: str) -> Batch:
        if (error := next(failures, None)) is not None:
            raise error
        batch: Batch = show(client, batch_id)
        return batch

    monkeypatch.setattr(Client, "show_batch", failing)
    monkeypatch.setattr(verbs, "_OUTAGE_S", outage)
    ended = shell("batch", "run", write(folder, "a"), code=0 if outage > 0 else 1)
    assert (folder / "asks.output.jsonl").exists() == (outage > 0)
    assert ("prefixd batch wait" in ended.stderr) == (outage < 0)


def test_a_large_output_is_read_in_pieces(
    shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "_PIECE", 100)
    shell("batch", "run", write(folder, "a", "b"))
    assert len((folder / "asks.output.jsonl").read_text().splitlines()) == 2


def test_the_bar_shows_status_and_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with line_bar(Console(file=terminal, force_terminal=True, width=80)) as show:
        show("in_progress", 3, 8)
    assert "in_progress" in terminal.getvalue()
    assert "3/8" in terminal.getvalue()
    with line_bar(Console(file=io.StringIO())) as show:
        show("in_progress", 3, 8)  # nothing without a terminal


def test_files_of_the_client(shell: Shell, folder: Path) -> None:
    sent: list[tuple[int, int]] = []
    path = write(folder, "a", "b")
    uploaded = shell.client.upload_file(
        path, expires_after=3600, progress=lambda *counts: sent.append(counts)
    )
    assert (uploaded.filename, uploaded.purpose) == ("asks.jsonl", "batch")
    assert uploaded.expires_at == uploaded.created_at + 3600
    assert sent[-1][0] == sent[-1][1] > uploaded.bytes
    assert shell.client.read_file(uploaded.id) == path.read_bytes()
    assert shell.client.read_file(uploaded.id, start=2, stop=5) == path.read_bytes()[2:5]
    page = shell.client.list_files(limit=1, purpose="batch")
    assert [file.id for file in page.files] == [uploaded.id]
    assert page.has_more
    assert shell.client.show_file(uploaded.id) == uploaded
    shell.client.delete_file(uploaded.id)
    with pytest.raises(errors.NotFoundError):
        shell.client.show_file(uploaded.id)


def test_the_asynchronous_client_has_the_same_operations(
    served: tuple[World, str], folder: Path
) -> None:
    world, url = served

    async def use() -> None:
        async with AsyncClient(url, api_key=world.keys["acme"]) as client:
            uploaded = await client.upload_file(write(folder, "a"))
            batch = await client.create_batch(
                uploaded.id, endpoint="/v1/completions", metadata={"k": "v"}
            )
            while not batch.has_ended:
                batch = await client.show_batch(batch.id)
            assert batch.metadata == {"k": "v"}
            assert batch.output_file_id is not None
            assert await client.read_file(batch.output_file_id)

    anyio.run(use)
