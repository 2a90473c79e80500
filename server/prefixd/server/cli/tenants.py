"""Verbs on the configured catalog, with or without a running server: tenants, keys, audit."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from prefixd.server.cli.options import (
    CATALOG_FLAGS,
    JsonFlag,
    fail,
    opened_catalog,
    print_json,
    with_settings,
)
from prefixd.server.cli.output import printable
from prefixd.server.serve.settings import Settings

if TYPE_CHECKING:
    from prefixd.server.tenants.registry import TenantRecord

tenant_app = typer.Typer(help="Tenants, on the configured catalog.", no_args_is_help=True)
key_app = typer.Typer(help="API keys, on the configured catalog.", no_args_is_help=True)

_CENTURY_DAYS = 100 * 366

WeightOption = Annotated[
    float | None,
    typer.Option(
        envvar="PREFIXD_TENANT_WEIGHT",
        help="Share of a busy server against other tenants', 0.01 to 100; 2 gets twice as much.",
    ),
]
ReuseOption = Annotated[
    bool | None,
    typer.Option(
        "--kv-reuse/--no-kv-reuse",
        envvar="PREFIXD_TENANT_KV_REUSE",
        help="Whether its requests share KV of equal tokens.",
    ),
]


def mount(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.add_typer(tenant_app, name="tenant")
    app.add_typer(key_app, name="key")
    app.command("audit")(audit)


# -- tenants --------------------------------------------------------------------------------------


@tenant_app.command("create")
@with_settings(*CATALOG_FLAGS)
def create_tenant(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="1 to 64 of A-Z a-z 0-9 . _ -")],
    weight: WeightOption = None,
    kv_reuse: ReuseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Add a tenant."""
    given = _settings(weight, kv_reuse)
    with opened_catalog(settings) as catalog:
        made = catalog.tenants.create_tenant(name, settings=given)
    if as_json:
        print_json(asdict(made))
    else:
        typer.echo(f"tenant {made.name} created")


@tenant_app.command("set")
@with_settings(*CATALOG_FLAGS)
def set_tenant(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="The tenant.")],
    weight: WeightOption = None,
    kv_reuse: ReuseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show or change how a tenant is treated beside others, from its next request on."""
    given = _settings(weight, kv_reuse)
    with opened_catalog(settings) as catalog:
        tenants = catalog.tenants
        found = tenants.set_settings(name, given) if given else tenants.tenant(name)
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(f"{'weight':<24} {found.weight:g}")
    typer.echo(f"{'kv_reuse':<24} {'on' if found.kv_reuse else 'off'}")


def _settings(weight: float | None, kv_reuse: bool | None) -> dict[str, float | bool]:
    given = {"weight": weight, "kv_reuse": kv_reuse}
    return {name: value for name, value in given.items() if value is not None}


@tenant_app.command("ls")
@with_settings(*CATALOG_FLAGS)
def list_tenants(settings: Settings, as_json: JsonFlag = False) -> None:
    """List tenants with their limits, and with their settings where they are not the usual."""
    with opened_catalog(settings) as catalog:
        found = catalog.tenants.list_tenants()
    if as_json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        typer.echo(f"{one.name:<32} {one.created_at:%Y-%m-%d %H:%M}  {_limits(one)}".rstrip())


@tenant_app.command("quota")
@with_settings(*CATALOG_FLAGS)
def quota(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="The tenant.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="LIMIT=NUMBER, or LIMIT=none; several. None named: show them."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show or change a tenant's limits; they hold from the next request on."""
    wanted = dict(_change(one) for one in changes or [])
    with opened_catalog(settings) as catalog:
        tenants = catalog.tenants
        found = tenants.set_quota(name, wanted) if wanted else tenants.tenant(name)
    if as_json:
        print_json(asdict(found.quota))
        return
    for limit, value in asdict(found.quota).items():
        typer.echo(f"{limit:<24} {'none' if value is None else value}")


def _change(text: str) -> tuple[str, int | None]:
    name, _, value = text.partition("=")
    if value == "none":
        return name.replace("-", "_"), None
    if not value.isdecimal():
        fail(f"expected LIMIT=NUMBER or LIMIT=none, such as max_prefixes=100; got {text!a}")
    return name.replace("-", "_"), int(value)


def _limits(tenant: "TenantRecord") -> str:
    shown = [
        f"{limit}={value}" for limit, value in asdict(tenant.quota).items() if value is not None
    ]
    if tenant.weight != 1.0:
        shown.append(f"weight={tenant.weight:g}")
    if not tenant.kv_reuse:
        shown.append("kv_reuse=off")
    return " ".join(shown)


# -- keys -----------------------------------------------------------------------------------------


@key_app.command("create")
@with_settings(*CATALOG_FLAGS)
def create_key(
    *,
    settings: Settings,
    tenant: Annotated[str, typer.Option(envvar="PREFIXD_KEY_TENANT", help="Whose key.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PREFIXD_KEY_SCOPE",
            help="read, generate, write, admin; repeat. Default: all but admin.",
        ),
    ] = None,
    label: Annotated[
        str, typer.Option(envvar="PREFIXD_KEY_LABEL", help="A note to tell keys apart.")
    ] = "",
    expires_in_days: Annotated[
        float | None,
        typer.Option(
            envvar="PREFIXD_KEY_EXPIRES_IN_DAYS",
            help="Default: never.",
            min=0,
            max=_CENTURY_DAYS,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Issue an API key and print it, this once."""
    from prefixd.server.tenants.registry import DEFAULT_SCOPES, Scope

    try:
        scopes = [Scope(word) for word in scope] if scope else DEFAULT_SCOPES
    except ValueError as error:
        fail(f"--scope: {error}; expected one of {', '.join(Scope)}")
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
@with_settings(*CATALOG_FLAGS)
def list_keys(
    settings: Settings,
    tenant: Annotated[
        str | None, typer.Option(envvar="PREFIXD_KEY_TENANT", help="Only this tenant's.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List keys, without their secrets."""
    with opened_catalog(settings) as catalog:
        found = catalog.tenants.list_keys(tenant)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    now = datetime.now(UTC)
    for key in found:
        until = "-" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
        scopes = ",".join(key.scopes)
        line = (
            f"{key.key_id}  {key.tenant:<24} {key.state(now):<9} {until:<17} {scopes:<30} "
            f"{key.label}"
        )
        typer.echo(printable(line).rstrip())


@key_app.command("rotate")
@with_settings(*CATALOG_FLAGS)
def rotate_key(
    settings: Settings,
    key_id: Annotated[str, typer.Argument(help="As `prefixd key ls` shows it.")],
    overlap_hours: Annotated[
        float,
        typer.Option(
            envvar="PREFIXD_KEY_OVERLAP_HOURS",
            help="How long the old key stays good.",
            min=0,
            max=24 * _CENTURY_DAYS,
        ),
    ] = 24.0,
    as_json: JsonFlag = False,
) -> None:
    """Issue a successor and print it; the old key stays good for a while."""
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
@with_settings(*CATALOG_FLAGS)
def revoke_key(
    settings: Settings,
    key_id: Annotated[str, typer.Argument(help="As `prefixd key ls` shows it.")],
    as_json: JsonFlag = False,
) -> None:
    """Stop a key, at its next request, for good."""
    with opened_catalog(settings) as catalog:
        record = catalog.tenants.revoke_key(key_id)
    if as_json:
        print_json(asdict(record))
    else:
        typer.echo(f"key {record.key_id} of {record.tenant} revoked")


# -- audit ----------------------------------------------------------------------------------------


@with_settings(*CATALOG_FLAGS)
def audit(
    settings: Settings,
    tenant: Annotated[
        str | None, typer.Option(envvar="PREFIXD_AUDIT_TENANT", help="Only this tenant's things.")
    ] = None,
    limit: Annotated[
        int, typer.Option(envvar="PREFIXD_AUDIT_LIMIT", help="Most entries.", min=1)
    ] = 50,
    before: Annotated[
        int | None,
        typer.Option(envvar="PREFIXD_AUDIT_BEFORE", help="Only entries older than this id."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show who did what to which prefix, key, binding and tenant, newest first."""
    with opened_catalog(settings) as catalog:
        found, _ = catalog.audit.page(tenant=tenant, limit=limit, before=before)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        who = one.actor_key or "command line"
        detail = " ".join(f"{name}={value}" for name, value in one.detail.items())
        line = (
            f"{one.id:<8} {one.at:%Y-%m-%d %H:%M:%S}  {who:<12}  {one.tenant:<20} "
            f"{one.action:<16} {one.subject}  {detail}"
        )
        typer.echo(printable(line).rstrip())
