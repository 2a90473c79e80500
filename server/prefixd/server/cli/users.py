"""``prefixd user``: which prefix an end user gets, on a running server."""

from pathlib import Path
from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.client.types import Binding
from prefixd.server.cli.options import JsonFlag, VerbGroup, connected
from prefixd.server.cli.output import print_columns, print_json, printable

UserArgument = Annotated[str, typer.Argument(help="Your end user, as requests name them.")]
ReferenceArgument = Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")]

user_app = typer.Typer(
    cls=VerbGroup, help="Your end users and their prefixes.", no_args_is_help=True
)
default_app = typer.Typer(
    cls=VerbGroup, help="The prefix of users without a binding.", no_args_is_help=True
)
user_app.add_typer(default_app, name="default")


@user_app.command("bind")
@connected
def bind(
    client: Client, *, user: UserArgument, prefix: ReferenceArgument, as_json: JsonFlag = False
) -> None:
    """Bind USER to PREFIX, from the next request on."""
    binding = client.bind_user(user, prefix)
    if as_json:
        print_json(binding)
    else:
        typer.echo(f"{printable(binding.user)} has {binding.prefix}")


@user_app.command("unbind")
@connected
def unbind(client: Client, *, user: UserArgument) -> None:
    """Remove the binding: USER then gets your default prefix, or the base without one."""
    client.unbind_user(user)
    typer.echo(f"{printable(user)} unbound")


@user_app.command("ls")
@connected
def list_users(client: Client, *, as_json: JsonFlag = False) -> None:
    """List the users that are bound."""
    bindings: list[Binding] = []
    after: str | None = None
    while True:
        page = client.list_bindings(limit=1000, after=after)
        bindings.extend(page.bindings)
        after = page.next_after
        if after is None:
            break
    if as_json:
        print_json(bindings)
        return
    rows = [
        (binding.user, binding.prefix, f"{binding.updated_at:%Y-%m-%d %H:%M}")
        for binding in bindings
    ]
    print_columns(("USER", "PREFIX", "SINCE"), rows)


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


@default_app.command("show")
@connected
def show_default(client: Client) -> None:
    """Show the default prefix."""
    typer.echo(client.show_default())


@default_app.command("set")
@connected
def set_default(client: Client, *, prefix: ReferenceArgument) -> None:
    """Make PREFIX the default, from the next request on."""
    typer.echo(client.set_default(prefix))


@default_app.command("rm")
@connected
def remove_default(client: Client) -> None:
    """Remove the default: users without a binding get the base."""
    client.remove_default()
    typer.echo("no default prefix")
