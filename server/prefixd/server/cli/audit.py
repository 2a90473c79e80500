"""The verb that reads the audit log of the configured catalog."""

from typing import Annotated

import typer

from prefixd.server.cli.options import CATALOG_SETTINGS, JsonFlag, opened_catalog, with_settings
from prefixd.server.cli.output import print_json, printable
from prefixd.server.serve.settings import Settings


@with_settings(*CATALOG_SETTINGS)
def audit(
    settings: Settings,
    tenant: Annotated[str | None, typer.Option(help="Only entries about this tenant.")] = None,
    limit: Annotated[int, typer.Option(help="Most entries.", min=1, max=2**31 - 1)] = 50,
    before: Annotated[
        int | None, typer.Option(help="Only entries older than this id.", min=1, max=2**63 - 1)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show who did what to which prefix, key, binding and tenant, newest first."""
    with opened_catalog(settings) as catalog:
        if tenant is not None:
            catalog.tenants.tenant(tenant)  # raises for an unknown one
        entries, _ = catalog.audit.page(tenant=tenant, limit=limit, before=before)
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        actor = entry.actor_key or "command line"
        detail = " ".join(f"{name}={value}" for name, value in entry.detail.items())
        line = (
            f"{entry.id:<8} {entry.at:%Y-%m-%d %H:%M:%S}  {actor:<12}  {entry.tenant:<20} "
            f"{entry.action:<16} {entry.subject}  {detail}"
        )
        typer.echo(printable(line).rstrip())
