"""``prefixd batch``: files of requests that a running server answers when it has room."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated

import typer

from prefixd.client.errors import ClientError, TransportError, UnavailableError
from prefixd.client.sync import Client
from prefixd.client.types import Batch
from prefixd.server.cli.options import JsonFlag, VerbGroup, connected
from prefixd.server.cli.output import (
    fail,
    print_columns,
    print_fields,
    print_json,
    printable,
)
from prefixd.server.cli.progress import line_bar, upload_bar

FileArgument = Annotated[
    Path,
    typer.Argument(
        help="JSONL: a request in each line.", exists=True, dir_okay=False, readable=True
    ),
]
BatchArgument = Annotated[str, typer.Argument(metavar="ID", help="Of a batch: batch_….")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="File for the answers; those that are errors get the same name with .errors. Default: "
        "FILE, or the batch's id, with .output.jsonl.",
    ),
]

batch_app = typer.Typer(
    cls=VerbGroup, help="Many requests, answered when there is room.", no_args_is_help=True
)

_FIRST_PAUSE_S = 0.1
_MOST_PAUSE_S = 2.0
_OUTAGE_S = 300.0
_PIECE = 8 * 1024 * 1024
_INTERRUPTED = 130


@batch_app.command("run")
@connected
def run(
    client: Client,
    *,
    file: FileArgument,
    out: OutOption = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="The url of all lines. Default: that of the first."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model of lines that name none.")
    ] = None,
    window: Annotated[
        str, typer.Option("--window", help="How long it may run: 24h, 30m, 7d.")
    ] = "24h",
    as_json: JsonFlag = False,
) -> None:
    """Upload FILE, run its lines, wait, and write their answers, in the order of FILE.

    Ctrl-C ends the waiting, and the batch goes on.
    """
    out = out or Path(f"{file.stem}.output.jsonl")
    _check_new(out)
    endpoint = endpoint or _first_url(file)
    with _with_model(file, model) as content, upload_bar() as progress:
        uploaded = client.upload_file(content, filename=file.name, progress=progress)
    batch = client.create_batch(uploaded.id, endpoint=endpoint, completion_window=window)
    _wait(client, batch, out, as_json=as_json)


@batch_app.command("wait")
@connected
def wait(
    client: Client, *, batch_id: BatchArgument, out: OutOption = None, as_json: JsonFlag = False
) -> None:
    """Wait until a batch has ended, and write its answers."""
    out = out or Path(f"{batch_id}.output.jsonl")
    _check_new(out)
    _wait(client, client.show_batch(batch_id), out, as_json=as_json)


@batch_app.command("ls")
@connected
def list_batches(client: Client, *, as_json: JsonFlag = False) -> None:
    """List the batches, newest first."""
    batches: list[Batch] = []
    after: str | None = None
    while True:
        page = client.list_batches(limit=1000, after=after)
        batches.extend(page.batches)
        if not page.has_more:
            break
        after = page.last_id
    if as_json:
        print_json(batches)
        return
    rows = [
        (batch.id, batch.status, batch.endpoint, _counts(batch), _time(batch.created_at))
        for batch in batches
    ]
    print_columns(("ID", "STATUS", "ENDPOINT", "LINES", "CREATED"), rows)


@batch_app.command("show")
@connected
def show(client: Client, *, batch_id: BatchArgument, as_json: JsonFlag = False) -> None:
    """Show a batch."""
    batch = client.show_batch(batch_id)
    if as_json:
        print_json(batch)
    else:
        _print(batch)


@batch_app.command("cancel")
@connected
def cancel(client: Client, *, batch_id: BatchArgument, as_json: JsonFlag = False) -> None:
    """Have no more lines of a batch run; `batch wait` then writes what was answered."""
    batch = client.cancel_batch(batch_id)
    if as_json:
        print_json(batch)
    else:
        typer.echo(f"{batch.id}  {batch.status}")


def _wait(client: Client, batch: Batch, out: Path, *, as_json: bool) -> None:
    """Show the progress of a batch until it has ended, and write its files."""
    hint = (
        f"{batch.id} goes on. Wait for it again, or end it:\n"
        f"  prefixd batch wait {batch.id} --out {printable(str(out))}\n"
        f"  prefixd batch cancel {batch.id}"
    )
    try:
        batch = _ended(client, batch)
    except KeyboardInterrupt:
        typer.echo(f"\n{hint}", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except ClientError:
        typer.echo(hint, err=True)
        raise
    errors = out.with_name(f"{out.name}.errors")
    for file_id, path in ((batch.output_file_id, out), (batch.error_file_id, errors)):
        if file_id is not None:
            _download(client, file_id, path)
    if as_json:
        print_json(batch)
    else:
        _print(batch)
        if batch.output_file_id is not None:
            typer.echo(f"answers in {printable(str(out))}")
    if batch.error_file_id is not None:
        typer.echo(f"prefixd: errors in {printable(str(errors))}", err=True)
    if batch.status != "completed" or batch.request_counts.failed:
        raise typer.Exit(1)


def _ended(client: Client, batch: Batch) -> Batch:
    """The batch when it has ended; a server that restarts does not respond for a while."""
    pause, failing_since = _FIRST_PAUSE_S, monotonic()
    with line_bar() as show_lines:
        while not batch.has_ended:
            sleep(pause)
            pause = min(1.5 * pause, _MOST_PAUSE_S)
            try:
                batch = client.show_batch(batch.id)
            except (TransportError, UnavailableError):
                if monotonic() - failing_since > _OUTAGE_S:
                    raise
                continue
            failing_since = monotonic()
            counts = batch.request_counts
            show_lines(batch.status, counts.completed + counts.failed, counts.total)
    return batch


def _download(client: Client, file_id: str, path: Path) -> None:
    """Write a file in pieces; ``path`` appears when it is complete."""
    size = client.show_file(file_id).bytes
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for start in range(0, size, _PIECE):
            file.write(client.read_file(file_id, start=start, stop=min(start + _PIECE, size)))
    partial.replace(path)


def _check_new(out: Path) -> None:
    if out.exists():
        fail(f"{out} exists: name another file with --out, or remove it")


def _first_url(file: Path) -> str:
    with file.open("rb") as lines:
        for raw in lines:
            if raw.strip():
                break
        else:
            fail(f"{file} has no lines")
    try:
        url = json.loads(raw)["url"]
    except (ValueError, TypeError, KeyError):
        url = None
    if not isinstance(url, str):
        fail(f"expected a JSON object with a url in the first line of {file}; or name --endpoint")
    return url


@contextmanager
def _with_model(file: Path, model: str | None) -> Iterator[Path]:
    """``file``, or a copy whose lines all name a model. Lines that are no requests are copied
    unchanged: the server says what is wrong with them."""
    if model is None:
        yield file
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        with file.open("rb") as lines:
            for raw in lines:
                copy.write(_named(raw, model))
        copy.flush()
        yield Path(copy.name)


def _named(raw: bytes, model: str) -> bytes:
    try:
        request = json.loads(raw)
        request["body"].setdefault("model", model)
        return json.dumps(request, ensure_ascii=False).encode() + b"\n"
    except (ValueError, TypeError, KeyError, AttributeError):
        return raw


def _print(batch: Batch) -> None:
    counts = batch.request_counts
    print_fields(
        {
            "batch": batch.id,
            "status": batch.status,
            "endpoint": batch.endpoint,
            "lines": counts.total,
            "completed": counts.completed,
            "failed": counts.failed,
            "created": _time(batch.created_at),
            "expires": _time(batch.expires_at),
        }
    )
    for error in () if batch.errors is None else batch.errors.errors:
        place = "" if error.line is None else f"line {error.line}: "
        typer.echo(f"prefixd: {place}{printable(error.message)} ({error.code})", err=True)


def _counts(batch: Batch) -> str:
    counts = batch.request_counts
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.completed + counts.failed}/{counts.total}{failed}"


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
