"""``prefixd prefix alias|unalias|warm|pin|unpin``: what a name means, and what stays resident."""

from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.server.cli.options import JsonFlag
from prefixd.server.cli.output import print_json

NameArgument = Annotated[str, typer.Argument(help="The prefix.", show_default=False)]
ReferenceArgument = Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")]


def alias(
    client: Client,
    *,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="Such as prod.")],
    version: Annotated[
        str,
        typer.Argument(
            help="Its version: a number, or another alias, such as latest, for the version that it "
            "names now."
        ),
    ],
) -> None:
    """Point NAME@ALIAS to a version, from the next request on."""
    is_number = version.isascii() and version.isdigit()
    target = client.set_alias(name, alias, version=int(version) if is_number else version)
    typer.echo(f"{name}@{alias} is {target.reference}")


def unalias(
    client: Client,
    *,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="The alias to remove; its version stays.")],
) -> None:
    """Remove an alias."""
    client.remove_alias(name, alias)
    typer.echo(f"{name}@{alias} removed")


def warm(client: Client, *, reference: ReferenceArgument, as_json: JsonFlag = False) -> None:
    """Make a version resident before the first request for it. Does not wait until it is."""
    residency = client.warm(reference)
    if as_json:
        print_json(residency)
    else:
        typer.echo(f"{residency.reference}  {residency.state}")


def pin(client: Client, *, reference: ReferenceArgument, as_json: JsonFlag = False) -> None:
    """Keep a version resident, in place of any other version of its prefix."""
    prefix = client.pin(reference)
    if as_json:
        print_json(prefix)
    else:
        typer.echo(f"{prefix.reference}  pinned")


def unpin(client: Client, *, name: NameArgument) -> None:
    """Allow a pinned prefix to be evicted again."""
    client.unpin(name)
    typer.echo(f"{name} unpinned")
