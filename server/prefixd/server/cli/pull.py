"""``prefixd prefix pull``: a version of a running server as files."""

from pathlib import Path
from typing import Annotated

import typer

from prefixd.client.artifacts import read_artifact
from prefixd.client.folders import check_new, write_version
from prefixd.client.sync import Client
from prefixd.server.cli.options import JsonFlag
from prefixd.server.cli.output import print_json, printable


def pull(
    client: Client,
    *,
    reference: Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")],
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.", show_default=False)],
    as_json: JsonFlag = False,
) -> None:
    """Download a version as files: PEFT's two, or prefix.txt, and prefixd.json.

    PEFT loads the folder, and `prefix push` uploads it again with the same digest.
    """
    check_new(folder)
    prefix = client.show_prefix(reference)
    data = client.download_artifact(prefix.name, version=prefix.version)
    write_version(folder, prefix, read_artifact(data, prefix))
    if as_json:
        print_json(prefix)
    else:
        typer.echo(
            printable(
                f"{prefix.reference}  pulled into {folder}  {prefix.kind}, "
                f"{prefix.num_virtual_tokens} virtual tokens, {prefix.digest[:12]}"
            )
        )
