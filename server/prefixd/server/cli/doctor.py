"""``prefixd doctor``: whether this machine has what a server needs."""

from collections.abc import Callable
from typing import Annotated

import typer

from prefixd.server.cli.options import (
    CATALOG_SETTINGS,
    JsonFlag,
    demo_model_packages,
    missing_extra,
    reported_errors,
    with_settings,
)
from prefixd.server.cli.output import json_text, print_json, printable
from prefixd.server.serve.settings import Settings


@with_settings(
    *CATALOG_SETTINGS,
    "model",
    "fingerprint_of",
    "dtype",
    "device",
    "cpu_kernels",
    "quantize",
    "tensor_parallel",
)
def doctor(
    settings: Settings,
    integrity: Annotated[
        bool,
        typer.Option(
            "--integrity",
            help="Check the stored data instead: every version has its blob with the right digest "
            "and size, every alias, pin and binding its target; nothing is left over. Reads all "
            "blobs; servers may run.",
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check what a server needs: data folder, catalog, torch, device, kernels, int8, model."""
    if integrity:
        _check_integrity(settings, as_json=as_json)
        return
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


def _check_integrity(settings: Settings, *, as_json: bool) -> None:
    """Print each finding at once: there may be as many as rows. Exit 1 when there is one."""
    count = 0
    with reported_errors():
        from prefixd.server.serve.catalog import open_integrity

        with open_integrity(settings) as integrity:
            if as_json:
                typer.echo('{"findings": [', nl=False)
            for count, finding in enumerate(integrity.findings(), start=1):
                if as_json:
                    typer.echo((",\n" if count > 1 else "\n") + json_text(finding), nl=False)
                else:
                    typer.echo(printable(f"FAIL {finding}"))
            checked = integrity.counts()
    if as_json:
        typer.echo(f'],\n"checked": {json_text(checked)},\n"ok": {json_text(count == 0)}}}')
    else:
        summary = ", ".join(
            f"{number} {noun.replace('_', ' ')}" for noun, number in checked.items()
        )
        typer.echo(f"{'FAIL' if count else 'ok  '} integrity {count} findings; checked {summary}")
    if count:
        raise typer.Exit(1)


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


def _check_torch(settings: Settings) -> str:
    import torch

    from prefixd.server.serve.loading import threads_of

    return f"torch {torch.__version__}, {threads_of(settings)} threads"


def _check_device(settings: Settings) -> str:
    from prefixd.server.serve.loading import check_ranks, device_of

    device = device_of(settings)
    check_ranks(settings, device=device)
    ranks = settings.tensor_parallel
    return device if ranks == 1 else f"{device}, with {ranks} processes that share the model"


def _check_kernels(settings: Settings) -> str:
    from prefixd.server.serve.loading import device_of
    from prefixd.server.serve.native_kernels import describe_kernels

    return describe_kernels(settings, device=device_of(settings))


def _check_int8(settings: Settings) -> str:
    from prefixd.server.serve.checks import check_int8
    from prefixd.server.serve.loading import device_of

    return check_int8(settings, device=device_of(settings))


def _check_model(settings: Settings) -> str:
    if settings.model == "demo":
        demo_model_packages()
        if settings.fingerprint_of is None:  # without torch, which takes seconds
            return "the bundled demo model is installed"
    from prefixd.server.serve.checks import model_origin

    return model_origin(settings)


_CHECKS: dict[str, Callable[[Settings], str]] = {
    "data": _check_data,
    "catalog": _check_catalog,
    "torch": _check_torch,
    "device": _check_device,
    "kernels": _check_kernels,
    "int8": _check_int8,
    "model": _check_model,
}
