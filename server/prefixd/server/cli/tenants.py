"""Verbs on the configured catalog, with or without a running server: tenants and keys."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from prefixd.server.cli.options import (
    CATALOG_SETTINGS,
    JsonFlag,
    VerbGroup,
    opened_catalog,
    with_settings,
)
from prefixd.server.cli.output import fail, print_columns, print_fields, print_json, printable
from prefixd.server.serve.settings import Settings

if TYPE_CHECKING:
    from prefixd.server.tenants.registry import TenantRecord

tenant_app = typer.Typer(
    cls=VerbGroup, help="Tenants, on the configured catalog.", no_args_is_help=True
)
key_app = typer.Typer(
    cls=VerbGroup, help="API keys, on the configured catalog.", no_args_is_help=True
)

_CENTURY_DAYS = 100 * 366

WeightOption = Annotated[
    float | None,
    typer.Option(
        help="Share of a busy server relative to other tenants, 0.01 to 100; 2 gets twice as much.",
    ),
]
ReuseOption = Annotated[
    bool | None,
    typer.Option(
        "--kv-reuse/--no-kv-reuse",
        help="Whether its requests share KV of equal tokens.",
    ),
]


# -- tenants --------------------------------------------------------------------------------------


@tenant_app.command("create")
@with_settings(*CATALOG_SETTINGS, "default_quota")
def create_tenant(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="1 to 64 of A-Z a-z 0-9 . _ -")],
    weight: WeightOption = None,
    kv_reuse: ReuseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Add a tenant, with the default limits."""
    changes = _settings(weight, kv_reuse)
    with opened_catalog(settings) as catalog:
        tenant = catalog.tenants.create_tenant(name, settings=changes)
    if as_json:
        print_json(tenant)
    else:
        typer.echo(f"tenant {tenant.name} created")


@tenant_app.command("set")
@with_settings(*CATALOG_SETTINGS)
def set_tenant(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="The tenant.")],
    weight: WeightOption = None,
    kv_reuse: ReuseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show or change a tenant's weight and KV reuse, from its next request on."""
    changes = _settings(weight, kv_reuse)
    with opened_catalog(settings) as catalog:
        tenants = catalog.tenants
        tenant = tenants.set_settings(name, changes) if changes else tenants.tenant(name)
    if as_json:
        print_json(tenant)
        return
    print_fields({"weight": f"{tenant.weight:g}", "kv_reuse": "on" if tenant.kv_reuse else "off"})


def _settings(weight: float | None, kv_reuse: bool | None) -> dict[str, float | bool]:
    values = {"weight": weight, "kv_reuse": kv_reuse}
    return {name: value for name, value in values.items() if value is not None}


@tenant_app.command("ls")
@with_settings(*CATALOG_SETTINGS)
def list_tenants(settings: Settings, as_json: JsonFlag = False) -> None:
    """List tenants, with the limits and settings that are not the default and the limits that they
    do not have."""
    with opened_catalog(settings) as catalog:
        tenants = catalog.tenants.list_tenants()
    if as_json:
        print_json(tenants)
        return
    from prefixd.server.serve.catalog import changed_limits

    for tenant in tenants:
        created = f"{tenant.created_at:%Y-%m-%d %H:%M}"
        typer.echo(
            f"{tenant.name:<32} {created}  {_marks(tenant, changed_limits(tenant.quota))}".rstrip()
        )


@tenant_app.command("show")
@with_settings(*CATALOG_SETTINGS)
def show_tenant(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="The tenant.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a tenant: its limits and what it uses of each, its settings and its keys."""
    with opened_catalog(settings) as catalog:
        usage = catalog.tenants.used(name)
    tenant = usage.tenant
    if as_json:
        print_json({**asdict(tenant), "used": dict(usage.used), "keys": usage.keys})
        return
    print_fields(
        {
            "name": tenant.name,
            "created": f"{tenant.created_at:%Y-%m-%d %H:%M}",
            "default_prefix": tenant.default_prefix or "none",
            "weight": f"{tenant.weight:g}",
            "kv_reuse": "on" if tenant.kv_reuse else "off",
            "keys": usage.keys,
        }
    )
    if tenant.unlimited:
        print_fields({"no limit of": ", ".join(tenant.unlimited)})
    typer.echo()
    rows = [
        (limit, "none" if value is None else value, usage.used.get(limit, "-"))
        for limit, value in asdict(tenant.quota).items()
    ]
    print_columns(("QUOTA", "LIMIT", "USED"), rows)


@tenant_app.command("quota")
@with_settings(*CATALOG_SETTINGS)
def quota(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="The tenant.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="LIMIT=NUMBER or LIMIT=none; several. Default: show the limits."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show or change a tenant's limits, from its next request on."""
    limits = _parse_limits(changes or [])
    with opened_catalog(settings) as catalog:
        tenants = catalog.tenants
        tenant = tenants.set_quota(name, limits) if limits else tenants.tenant(name)
    if as_json:
        print_json(tenant.quota)
        return
    quota = asdict(tenant.quota).items()
    print_fields({limit: "none" if value is None else value for limit, value in quota})


def _parse_limits(words: list[str]) -> dict[str, int | None]:
    from prefixd.server.serve.catalog import parse_limits

    try:
        return parse_limits(words)
    except ValueError as error:
        fail(str(error))


def _marks(tenant: "TenantRecord", changed: dict[str, int]) -> str:
    shown = [f"{limit}={value}" for limit, value in changed.items()]
    if len(tenant.unlimited) == len(asdict(tenant.quota)):
        shown.append("no-limits")
    else:
        shown += [f"{limit}=none" for limit in tenant.unlimited]
    if tenant.weight != 1.0:
        shown.append(f"weight={tenant.weight:g}")
    if not tenant.kv_reuse:
        shown.append("kv_reuse=off")
    return " ".join(shown)


# -- keys -----------------------------------------------------------------------------------------


@key_app.command("create")
@with_settings(*CATALOG_SETTINGS)
def create_key(
    *,
    settings: Settings,
    tenant: Annotated[str, typer.Option(help="The key's tenant.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, generate, write, admin; repeat. Default: all except admin."),
    ] = None,
    label: Annotated[str, typer.Option(help="A note that distinguishes keys.")] = "",
    expires_in_days: Annotated[
        float | None, typer.Option(help="Default: never.", min=0, max=_CENTURY_DAYS)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Issue an API key and print it. It cannot be shown again."""
    from prefixd.server.serve.catalog import parse_scopes

    try:
        scopes = parse_scopes(scope or ())
    except ValueError as error:
        fail(f"--scope: {error}")
    expires_at = None
    if expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=expires_in_days)
    with opened_catalog(settings) as catalog:
        issued = catalog.tenants.create_key(
            tenant=tenant, scopes=scopes, label=label, expires_at=expires_at
        )
    if as_json:
        print_json({"key": issued.text, **asdict(issued.record)})
    else:
        typer.echo(issued.text)
        typer.echo("Keep it: it is not stored and cannot be shown again.", err=True)


@key_app.command("ls")
@with_settings(*CATALOG_SETTINGS)
def list_keys(
    settings: Settings,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List keys, without their secrets."""
    with opened_catalog(settings) as catalog:
        if tenant is not None:
            catalog.tenants.tenant(tenant)  # raises for an unknown one
        keys = catalog.tenants.list_keys(tenant)
    if as_json:
        print_json(keys)
        return
    now = datetime.now(UTC)
    for key in keys:
        expiry = "-" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
        scopes = ",".join(key.scopes)
        line = (
            f"{key.key_id}  {key.tenant:<24} {key.state(now):<9} {expiry:<17} {scopes:<30} "
            f"{key.label}"
        )
        typer.echo(printable(line).rstrip())


@key_app.command("rotate")
@with_settings(*CATALOG_SETTINGS)
def rotate_key(
    settings: Settings,
    key_id: Annotated[str, typer.Argument(help="As `prefixd key ls` shows it.")],
    overlap_hours: Annotated[
        float,
        typer.Option(help="How long the old key stays valid.", min=0, max=24 * _CENTURY_DAYS),
    ] = 24.0,
    as_json: JsonFlag = False,
) -> None:
    """Issue a successor and print it; the old key stays valid for some hours."""
    with opened_catalog(settings) as catalog:
        issued = catalog.tenants.rotate_key(key_id, overlap=timedelta(hours=overlap_hours))
    if as_json:
        print_json({"key": issued.text, **asdict(issued.record)})
    else:
        typer.echo(issued.text)
        typer.echo(
            f"Keep it: it cannot be shown again. {key_id} ends in {overlap_hours:g} hours "
            "at the latest.",
            err=True,
        )


@key_app.command("revoke")
@with_settings(*CATALOG_SETTINGS)
def revoke_key(
    settings: Settings,
    key_id: Annotated[str, typer.Argument(help="As `prefixd key ls` shows it.")],
    as_json: JsonFlag = False,
) -> None:
    """Make a key invalid, permanently, from its next request on."""
    with opened_catalog(settings) as catalog:
        record = catalog.tenants.revoke_key(key_id)
    if as_json:
        print_json(record)
    else:
        typer.echo(f"key {record.key_id} of {record.tenant} revoked")
