"""``prefixd doctor``: whether this machine has what a server needs."""

from collections.abc import Callable

import typer

from prefixd.server.cli.options import (
    JsonFlag,
    demo_model_packages,
    missing_extra,
    with_settings,
)
from prefixd.server.cli.output import print_json
from prefixd.server.serve.settings import Settings


@with_settings("data_dir", "database_url", "model", "device")
def doctor(settings: Settings, as_json: JsonFlag = False) -> None:
    """Check what a server needs: data folder, catalog, torch, device and model."""
    results = {name: _result(check, settings) for name, check in _CHECKS.items()}
    if as_json:
        print_json(results)
    else:
        for name, result in results.items():
            typer.echo(f"{'ok  ' if result['ok'] else 'FAIL'} {name:<8} {result['detail']}")
    if not all(result["ok"] for result in results.values()):
        raise typer.Exit(1)


def _result(check: Callable[[Settings], str], settings: Settings) -> dict[str, object]:
    try:
        return {"ok": True, "detail": check(settings)}
    except ModuleNotFoundError as error:
        return {"ok": False, "detail": missing_extra(error)}
    except Exception as error:  # noqa: BLE001 - any failure of a check is its result
        return {"ok": False, "detail": str(error) or type(error).__name__}


def _check_data(settings: Settings) -> str:
    from prefixd.server.serve.data_folder import check_data_folder

    check_data_folder(settings.root)
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
        demo_model_packages()
        return "the bundled demo model is installed"
    from prefixd.server.serve.build import model_origin

    return model_origin(settings)


_CHECKS: dict[str, Callable[[Settings], str]] = {
    "data": _check_data,
    "catalog": _check_catalog,
    "torch": _check_torch,
    "device": _check_device,
    "model": _check_model,
}
