"""What the command-line verbs share: options, plain tables, errors as one sentence."""

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer
from rich.console import Console

from prefixd.client.errors import ApiError, AuthenticationError, ClientError, ConnectError
from prefixd.client.sync import Client
from prefixd.client.transport import DEFAULT_TIMEOUT, DEFAULT_URL

P = ParamSpec("P")
T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", envvar="PREFIXD_JSON", help="Print JSON.")]
# C0 and C1 controls but tab and newline: an answer must not steer the terminal.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """``text`` without control characters other than tab and newline."""
    return _CONTROLS.sub("", text)


def console() -> Console:
    """A console as wide as the terminal; 110 columns into a file, where rich would take 80."""
    return Console(width=None if sys.stdout.isatty() else 110)


def read_text(source: Path) -> str:
    """The text in a file, or on standard input where that is ``-``."""
    try:
        return sys.stdin.read() if str(source) == "-" else source.read_text("utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(
            f"{source} is no text in UTF-8; of a prefix that PEFT wrote, push its folder",
            param_hint="SOURCE",
        ) from None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors a user can meet into one sentence on standard error and exit code 1."""
    try:
        yield
    except (ClientError, OSError) as error:
        typer.echo(f"prefixd: {printable(_sentence(error))}", err=True)
        raise typer.Exit(1) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, AuthenticationError):
        return f"{error} (set PREFIXD_API_KEY or pass --api-key)"
    if isinstance(error, ConnectError):
        return f"{error} (is the server running? set PREFIXD_URL or pass --url)"
    if isinstance(error, ApiError) and error.request_id and error.status >= 500:
        return f"{error} (request {error.request_id})"
    return str(error)


def verb(command: Callable[P, T]) -> Callable[P, T]:
    """Wrap a command in ``plain_errors``; a reader that leaves early (``| head``) is no error."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with plain_errors():
            try:
                return command(*args, **kwargs)
            except BrokenPipeError:
                # Python flushes standard output once more at exit, and would complain there.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from None

    return run


def connected(command: Callable[Concatenate[Client, P], None]) -> Callable[..., None]:
    """Give a command a client for the server that the connection options name."""

    @verb
    def run(*, url: str, api_key: str | None, timeout: float, **own: Any) -> None:
        with Client(url, api_key=api_key, timeout=timeout) as client:
            command(client, **own)  # type: ignore[call-arg]  # typer fills in the command's own

    _, *own = inspect.signature(command).parameters.values()
    # Typer reads the signature: the command's own parameters, then where the server is.
    run.__signature__ = inspect.Signature([*own, *_CONNECTION])  # type: ignore[attr-defined]  # any function takes it
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _option(
    name: str, kind: object, default: object, variable: str, words: str
) -> inspect.Parameter:
    shown = default is not None
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(flag, envvar=variable, help=words, show_default=shown)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


_CONNECTION = (
    _option("url", str, DEFAULT_URL, "PREFIXD_URL", "The server."),
    _option("api_key", str | None, None, "PREFIXD_API_KEY", "A key of your tenant."),
    _option("timeout", float, DEFAULT_TIMEOUT, "PREFIXD_TIMEOUT", "Seconds to wait for an answer."),
)


def print_json(value: Any) -> None:
    """Print a pydantic model, or a list of them, as JSON."""
    plain = (
        [entry.model_dump() for entry in value]
        if isinstance(value, list | tuple)
        else value.model_dump()
    )
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=False, default=_json_default))


def _json_default(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns that cut and grep well."""
    cells = [list(titles), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())
