"""``prefixd user``: which prefix an end user gets, on a running server."""

from pathlib import Path
from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.client.types import Binding
from prefixd.server.cli import output as terminal
from prefixd.server.cli.output import JsonOption, connected

UserArgument = Annotated[str, typer.Argument(help="Your end user, as requests name them.")]
user_app = typer.Typer(help="Your end users and their prefixes.", no_args_is_help=True)


@user_app.command("bind")
@connected
def bind(
    client: Client,
    *,
    user: UserArgument,
    prefix: Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")],
    as_json: JsonOption = False,
) -> None:
    """Let USER have PREFIX, from the next request on."""
    made = client.bind_user(user, prefix)
    if as_json:
        terminal.print_json(made)
    else:
        typer.echo(f"{terminal.printable(made.user)} has {made.prefix}")


@user_app.command("unbind")
@connected
def unbind(client: Client, *, user: UserArgument) -> None:
    """Forget the binding: your default prefix answers USER then, else the base."""
    client.unbind_user(user)
    typer.echo(f"{terminal.printable(user)} unbound")


@user_app.command("ls")
@connected
def list_users(client: Client, *, as_json: JsonOption = False) -> None:
    """List the users that are bound."""
    found: list[Binding] = []
    after: str | None = None
    while True:
        page = client.list_bindings(limit=1000, after=after)
        found.extend(page.bindings)
        after = page.next_after
        if after is None:
            break
    if as_json:
        terminal.print_json(found)
        return
    rows = [(one.user, one.prefix, f"{one.updated_at:%Y-%m-%d %H:%M}") for one in found]
    terminal.print_columns(("USER", "PREFIX", "SINCE"), rows)


@user_app.command("import")
@connected
def import_users(
    client: Client,
    *,
    file: Annotated[
        Path,
        typer.Argument(
            help='Lines of {"user": …, "prefix": …}.', exists=True, dir_okay=False, readable=True
        ),
    ],
) -> None:
    """Bind many users at once."""
    typer.echo(f"{client.import_bindings(file.read_bytes())} users bound")


@user_app.command("default")
@connected
def default(
    client: Client,
    *,
    prefix: Annotated[
        str | None, typer.Argument(help="NAME, NAME@3 or NAME@alias. Not given: show it.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", envvar="PREFIXD_REMOVE", help="Have no default.")
    ] = False,
) -> None:
    """Show, set or remove the prefix of users without a binding."""
    if remove:
        client.remove_default()
        typer.echo("no default prefix")
        return
    typer.echo(client.show_default() if prefix is None else client.set_default(prefix))
