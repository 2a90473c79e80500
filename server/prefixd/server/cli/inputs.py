"""What the verbs read: text in UTF-8 and JSON, from arguments, files and standard input."""

import json
import sys
from pathlib import Path

import typer

from prefixd.client.errors import FormatError
from prefixd.client.folders import decode_text


def argument_text(text: str, *, name: str) -> str:
    """``text``, an argument. Raises BadParameter, which names it, unless its bytes were UTF-8."""
    # Python keeps the bytes that are not UTF-8 as lone surrogates.
    return _decoded(text.encode("utf-8", "surrogatepass"), source=name)


def input_text(source: str) -> str:
    """The text of a file, or of standard input where ``source`` is -. Raises BadParameter unless
    it is UTF-8, OSError for a file that cannot be read."""
    if source == "-":
        return _decoded(sys.stdin.buffer.read(), source="standard input")
    return _decoded(Path(source).read_bytes(), source=source)


def _decoded(data: bytes, *, source: str) -> str:
    try:
        return decode_text(data, source=source)
    except FormatError as error:
        raise typer.BadParameter(str(error)) from None


def json_object(text: str, *, hint: str) -> dict[str, object]:
    """The JSON object that a flag or a file holds. Raises BadParameter, which names ``hint``."""
    try:
        value = json.loads(argument_text(text, name=hint))
    except ValueError as error:
        raise typer.BadParameter(f"expected JSON: {error}", param_hint=hint) from None
    if not isinstance(value, dict):
        raise typer.BadParameter("expected a JSON object", param_hint=hint)
    return value
