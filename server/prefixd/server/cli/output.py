"""What the verbs print: text without control characters, JSON, columns, errors."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console

from prefixd.client.errors import ApiError, AuthenticationError, ClientError, ConnectError

# C0 and C1 controls except tab and newline, direction overrides and lone surrogates: an answer must
# neither control the terminal nor show text in another order.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with control characters other than tab and newline escaped, as ``\\u001b``."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def console() -> Console:
    """A console as wide as the terminal; 110 columns into a file, where rich would take 80."""
    return Console(width=None if sys.stdout.isatty() else 110)


def print_json(value: object) -> None:
    """Print plain values, dataclasses, pydantic models or lists of them, as JSON. Times are
    ISO 8601."""
    typer.echo(json_text(value, indent=2))


def json_text(value: object, *, indent: int | None = None) -> str:
    """What ``print_json`` prints, without ``indent`` on one line."""
    return printable(json.dumps(value, indent=indent, ensure_ascii=False, default=_plain))


def as_dict(record: object) -> dict[str, object]:
    """The fields of a dataclass or a pydantic model. TypeError for any other value."""
    if isinstance(record, BaseModel):
        return record.model_dump()
    if is_dataclass(record) and not isinstance(record, type):
        return asdict(record)
    raise TypeError(f"not a record: {type(record).__name__}")


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    try:
        return as_dict(value)
    except TypeError:
        return str(value)


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns that cut and grep well."""
    cells = [list(titles), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())


def print_fields(values: dict[str, object]) -> None:
    """Print one aligned line for each name and value."""
    width = max(24, *map(len, values))
    for name, value in values.items():
        typer.echo(f"{name:<{width}} {printable(str(value))}")


def fail(message: str, *, status: int = 1) -> NoReturn:
    """End the verb with a message on standard error."""
    typer.echo(f"prefixd: {printable(message)}", err=True)
    raise typer.Exit(status)


@contextmanager
def client_errors(status: int = 1) -> Iterator[None]:
    """End the verb with the message of an error of the client or of a file, and ``status``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ClientError, OSError) as error:
        fail(client_message(error), status=status)


def client_message(error: Exception) -> str:
    """What a verb says about an error of the client or of a file."""
    if isinstance(error, AuthenticationError):
        return f"{error} (set PREFIXD_API_KEY or pass --api-key)"
    if isinstance(error, ConnectError):
        return f"{error} (is the server running? set PREFIXD_URL or pass --url)"
    if isinstance(error, ApiError) and error.request_id and error.status >= 500:
        return f"{error} (request {error.request_id})"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
