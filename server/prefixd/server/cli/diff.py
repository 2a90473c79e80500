"""``prefixd prefix diff``: how two versions on a running server differ."""

import json
import re
from typing import Annotated

import typer

from prefixd.client.artifacts import Artifact, read_artifact
from prefixd.client.difference import Difference, TensorDifference, compare
from prefixd.client.sync import Client
from prefixd.client.types import Prefix
from prefixd.server.cli.options import JsonFlag
from prefixd.server.cli.output import print_columns, print_json

_SHOWN_CHARACTERS = 60
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def diff(
    client: Client,
    *,
    left: Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")],
    right: Annotated[str, typer.Argument(help="The version to compare with.")],
    as_json: JsonFlag = False,
) -> None:
    """Print how two versions differ: fields, the greatest difference of each tensor, or lines.

    The exit status is 0 when they are equal, 1 when they differ and 2 after an error.
    """
    difference = _compared(client, client.show_prefix(left), client.show_prefix(right))
    if as_json:
        fields = {name: dict(values) for name, values in difference.fields.items()}
        print_json(
            {
                "left": difference.left,
                "right": difference.right,
                "equal": difference.equal,
                "fields": fields,
                "tensors": difference.tensors,
                "text": "".join(difference.text),
            }
        )
    else:
        _print(difference)
    if not difference.equal:
        raise typer.Exit(1)


def _compared(client: Client, left: Prefix, right: Prefix) -> Difference:
    if left.digest == right.digest:
        return compare(left, right)
    return compare(left, right, (_downloaded(client, left), _downloaded(client, right)))


def _downloaded(client: Client, prefix: Prefix) -> Artifact:
    data = client.download_artifact(prefix.name, version=prefix.version)
    return read_artifact(data, prefix)


def _print(difference: Difference) -> None:
    if difference.equal:
        typer.echo(f"{difference.left} and {difference.right} are equal")
        return
    rows = [
        (name, _shown(values, "left"), _shown(values, "right"))
        for name, values in difference.fields.items()
    ]
    print_columns(("FIELD", difference.left, difference.right), rows)
    if difference.tensors:
        typer.echo()
        titles = ("TENSOR", "SHAPE", "DTYPE", "GREATEST DIFFERENCE")
        print_columns(titles, [_row(tensor) for tensor in difference.tensors])
    if difference.text:
        typer.echo()
        # Visible, and harmless to the terminal: two lines may differ in such a character alone.
        text = "".join(difference.text)
        typer.echo(_CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text), nl=False)


def _shown(values: object, side: str) -> str:
    if not isinstance(values, dict) or side not in values:
        return "-"
    text = json.dumps(values[side], ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _row(tensor: TensorDifference) -> tuple[str, str, str, str]:
    greatest = "-" if tensor.greatest is None else f"{tensor.greatest:g}"
    shapes = tuple("-" if shape is None else str(list(shape)) for shape in tensor.shapes)
    dtypes = tuple(dtype or "-" for dtype in tensor.dtypes)
    return tensor.name, _sides(shapes), _sides(dtypes), greatest


def _sides(values: tuple[str, ...]) -> str:
    """Both values, or one when they are equal."""
    return " / ".join(dict.fromkeys(values))
