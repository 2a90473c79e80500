"""``prefixd convert``: files of other tools as PEFT's two files."""

from pathlib import Path
from typing import Annotated

import typer

from prefixd.client.convert.sources import read_source, write_folder
from prefixd.client.errors import FormatError
from prefixd.server.cli.output import client_errors, printable


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A file or a folder in a format that docs/formats.md lists, or ORG/NAME on the "
            "Hub.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(help="The folder to write, for `prefix push`.", show_default=False)
    ],
    task_id: Annotated[
        int | None, typer.Option("--task-id", help="Task of a multi-task prefix or table.")
    ] = None,
) -> None:
    """Convert a prefix of another tool to PEFT's adapter_config.json and adapter_model.safetensors.

    Runs without a server. Pickles are read without running what they contain.
    """
    with client_errors():
        prefix = read_source(source, task_id=task_id)
        if prefix is None:
            Path(source).stat()  # the error of a path that does not exist
            raise FormatError(f"{source}: expected a format that docs/formats.md lists")
        write_folder(prefix, folder)
    for note in prefix.notes:
        typer.echo(f"prefixd: {printable(note)}", err=True)
    typer.echo(printable(f"{folder}  written, from {prefix.origin}"))
