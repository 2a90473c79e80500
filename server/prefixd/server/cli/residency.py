"""``prefixd prefix warm|pin|unpin``: what a running server keeps in its pool."""

from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.server.cli import output as terminal
from prefixd.server.cli.output import JsonOption, connected

ReferenceArgument = Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")]


def mount(app: typer.Typer) -> None:
    """Add these verbs to those of prefixes."""
    app.command("warm")(warm)
    app.command("pin")(pin)
    app.command("unpin")(unpin)


@connected
def warm(client: Client, *, reference: ReferenceArgument, as_json: JsonOption = False) -> None:
    """Make a version resident before anybody asks for it. Does not wait until it is."""
    found = client.warm(reference)
    if as_json:
        terminal.print_json(found)
    else:
        typer.echo(f"{found.reference}  {found.state}")


@connected
def pin(client: Client, *, reference: ReferenceArgument, as_json: JsonOption = False) -> None:
    """Keep a version resident, in place of any other version of its prefix."""
    found = client.pin(reference)
    if as_json:
        terminal.print_json(found)
    else:
        typer.echo(f"{found.reference}  pinned  {found.num_virtual_tokens} virtual tokens")


@connected
def unpin(
    client: Client, *, name: Annotated[str, typer.Argument(help="The prefix.", show_default=False)]
) -> None:
    """Let a pinned prefix go from residency as others do."""
    client.unpin(name)
    typer.echo(f"{name} unpinned")
