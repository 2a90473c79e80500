"""``prefixd prefix recipe``: how a version is to be called."""

from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.server.cli.aliases import ReferenceArgument
from prefixd.server.cli.inputs import input_text, json_object
from prefixd.server.cli.options import JsonFlag
from prefixd.server.cli.output import print_json


def recipe(
    client: Client,
    *,
    reference: ReferenceArgument,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            help="Replace it by the JSON object in this file, such as recipe.json of an example; - "
            "is standard input.",
        ),
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option("--patch", help="A JSON object to merge into it; null removes a field."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the recipe of a version as JSON, or change it: at once, also for a resident version.

    What is shown can be edited and set with --file. With --json a change prints the manifest.
    """
    name, _, version = reference.partition("@")
    if file is not None and patch is not None:
        raise typer.BadParameter("expected either --file or --patch")
    if file is not None:
        fields = json_object(input_text(file), hint="--file")
        prefix = client.set_recipe(name, fields, version=version or "latest")
    elif patch is not None:
        fields = json_object(patch, hint="--patch")
        prefix = client.patch_recipe(name, fields, version=version or "latest")
    else:
        print_json(client.show_prefix(reference).recipe.stated)
        return
    if as_json:
        print_json(prefix)
    else:
        typer.echo(f"{prefix.reference}  recipe revision {prefix.recipe_revision}")
