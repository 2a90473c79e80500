"""Verbs on the configured store, with or without a running server: gc, migrate, copy."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr

from prefixd.server.cli.options import (
    CATALOG_SETTINGS,
    JsonFlag,
    opened_catalog,
    reported_errors,
    with_settings,
)
from prefixd.server.cli.output import fail, print_json
from prefixd.server.serve.settings import Settings

if TYPE_CHECKING:
    from prefixd.store.copying import CopyResult


@with_settings(*CATALOG_SETTINGS)
def gc(
    settings: Settings,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds for which the bytes of a deleted prefix are kept. Default: the setting "
            "PREFIXD_GC_GRACE, 86400.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the bytes.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove the bytes of deleted prefixes and of interrupted uploads."""
    seconds = settings.gc_grace if grace is None else grace
    with opened_catalog(settings) as catalog:
        result = catalog.store.collect(
            grace=timedelta(seconds=seconds), adopt=True, dry_run=dry_run
        )
    if as_json:
        print_json({"dry_run": dry_run, **asdict(result)})
    else:
        verb = "would remove" if dry_run else "removed"
        typer.echo(
            f"{verb} {result.blobs} blobs, {result.bytes} bytes; found {result.adopted} unknown"
        )


@with_settings(*CATALOG_SETTINGS)
def migrate(settings: Settings, as_json: JsonFlag = False) -> None:
    """Upgrade the database to the tables of this version, as a server does when it starts."""
    with reported_errors():
        from prefixd.server.serve.catalog import migrate_database

        before, after = migrate_database(settings)
    if as_json:
        print_json({"from": before, "to": after})
    else:
        typer.echo(f"the database was at revision {before or 'none'} and is at {after}")


@with_settings(*CATALOG_SETTINGS)
def copy(
    settings: Settings,
    to_data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the copy."),
    ] = None,
    to_database_url: Annotated[
        str | None,
        typer.Option(help="Default: an SQLite file in that folder."),
    ] = None,
    to_blobs_url: Annotated[
        str | None,
        typer.Option(help="s3://bucket/prefix. Default: that folder."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy the whole store to an empty one: a move, such as to PostgreSQL and S3."""
    if to_data_dir is None and (to_database_url is None or to_blobs_url is None):
        fail("expected --to-data-dir, or both --to-database-url and --to-blobs-url")
    target = settings.model_copy(
        update={
            "data_dir": to_data_dir or settings.data_dir,
            "database_url": None if to_database_url is None else SecretStr(to_database_url),
            "blobs_url": to_blobs_url,
        }
    )
    with reported_errors():
        from prefixd.server.serve.catalog import copy_catalog

        result = copy_catalog(settings, target)
    print_copied(result, as_json=as_json)


def print_copied(result: "CopyResult", *, as_json: bool) -> None:
    """Print what was copied, and on standard error each blob that was corrupt."""
    if as_json:
        print_json(result)
    else:
        rows = sum(result.rows.values())
        typer.echo(f"copied {rows} rows and {result.blobs} blobs of {result.bytes} bytes")
    for key in result.corrupt:
        typer.echo(f"prefixd: not copied, corrupt or missing: {key.tenant} {key.digest}", err=True)
