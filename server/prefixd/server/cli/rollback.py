"""``prefixd prefix rollback``: the bare name set back to an earlier version."""

from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.server.cli.output import fail


def rollback(
    client: Client,
    *,
    name: Annotated[str, typer.Argument(help="The prefix.", show_default=False)],
    version: Annotated[
        int | None,
        typer.Argument(
            help="The version that NAME will mean. Default: the highest below the present one.",
            min=1,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Set the bare NAME back to an earlier version of the served base, until the next push."""
    if version is None:
        version = _version_below_latest(client, name)
    client.rollback(name, version=version)
    typer.echo(f"{name} is {name}@{version}")


def _version_below_latest(client: Client, name: str) -> int:
    latest = client.show_prefix(f"{name}@latest")
    page = client.list_versions(name, limit=1, before=latest.version)
    if not page.versions:
        fail(f"{latest.reference} is the lowest version of {name} for the base {latest.base}")
    return page.versions[0].version
