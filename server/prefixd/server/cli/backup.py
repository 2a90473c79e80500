"""``prefixd backup`` and ``restore``: the configured store to a folder, and back."""

from pathlib import Path
from typing import Annotated

import typer

from prefixd.server.cli.options import CATALOG_SETTINGS, JsonFlag, reported_errors, with_settings
from prefixd.server.cli.store import print_copied
from prefixd.server.serve.settings import Settings


@with_settings(*CATALOG_SETTINGS)
def backup(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="The backup: a new folder, or an empty one.")],
    as_json: JsonFlag = False,
) -> None:
    """Copy the whole store to a new folder, while servers run.

    Exits with status 1 when blobs were corrupt: the backup then lacks those.
    """
    with reported_errors():
        from prefixd.server.serve.catalog import back_up_catalog

        result = back_up_catalog(settings, folder)
    print_copied(result, as_json=as_json)
    if result.corrupt:
        raise typer.Exit(1)


@with_settings(*CATALOG_SETTINGS)
def restore(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A backup.")],
    as_json: JsonFlag = False,
) -> None:
    """Copy a backup to the configured store, which must be empty.

    Verifies the whole backup first. Exits with status 1 when it is damaged, and restores nothing;
    or when blobs were corrupt when it was made, and restores all else.
    """
    with reported_errors():
        from prefixd.server.serve.catalog import restore_catalog

        result = restore_catalog(folder, settings)
    print_copied(result, as_json=as_json)
    if result.corrupt:
        raise typer.Exit(1)
