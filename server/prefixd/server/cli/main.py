"""The command ``prefixd``: the server's verbs and the client's.

Each verb imports what it needs when it runs, so that the core installation has ``--help`` and the
verbs that talk to a server.
"""

from typing import Annotated

import typer

from prefixd.server import version
from prefixd.server.cli.audit import audit
from prefixd.server.cli.backup import backup, restore
from prefixd.server.cli.batches import batch_app
from prefixd.server.cli.bench import bench
from prefixd.server.cli.chat import chat
from prefixd.server.cli.convert import convert
from prefixd.server.cli.demo import demo
from prefixd.server.cli.doctor import doctor
from prefixd.server.cli.evaluate import evaluate
from prefixd.server.cli.options import VerbGroup
from prefixd.server.cli.output import printable
from prefixd.server.cli.prefixes import prefix_app
from prefixd.server.cli.serve import serve
from prefixd.server.cli.store import copy, gc, migrate
from prefixd.server.cli.tenants import key_app, tenant_app
from prefixd.server.cli.tokens import detokenize, tokenize
from prefixd.server.cli.users import user_app
from prefixd.server.cli.variables import unknown_variables_warning

app = typer.Typer(
    name="prefixd",
    cls=VerbGroup,
    help="Multi-tenant inference server with swappable prefixes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for verb in (serve, doctor, audit, gc, migrate, backup, restore, copy, convert, chat, bench, demo):
    app.command()(verb)
app.command("eval")(evaluate)
for verb in (tokenize, detokenize):
    app.command()(verb)
app.add_typer(tenant_app, name="tenant")
app.add_typer(key_app, name="key")
app.add_typer(prefix_app, name="prefix")
app.add_typer(user_app, name="user")
app.add_typer(batch_app, name="batch")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"prefixd {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    warning = unknown_variables_warning()
    if warning is not None:
        typer.echo(f"prefixd: {printable(warning)}", err=True)


def main() -> None:
    """Run the command line."""
    app()
