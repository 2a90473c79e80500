"""Verbs on the configured store, with or without a running server: gc, migrate, copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr

from prefixd.server.cli.options import (
    CATALOG_FLAGS,
    JsonFlag,
    fail,
    opened_catalog,
    print_json,
    refusals,
    with_settings,
)
from prefixd.server.serve.settings import Settings

if TYPE_CHECKING:
    from prefixd.store.copying import Place


def mount(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command("gc")(collect)
    app.command("migrate")(migrate)
    app.command("copy")(copy)


@with_settings(*CATALOG_FLAGS)
def collect(
    settings: Settings,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            envvar="PREFIXD_GC_GRACE",
            help="Seconds for which the bytes of a deleted prefix are kept. Default: 86400.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", envvar="PREFIXD_GC_DRY_RUN", help="Say what would be removed."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove the bytes of deleted prefixes, and what killed uploads left."""
    seconds = settings.gc_grace if grace is None else grace
    with opened_catalog(settings) as catalog:
        done = catalog.store.collect(grace=timedelta(seconds=seconds), adopt=True, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(done)})
    else:
        verb = "would remove" if dry_run else "removed"
        typer.echo(f"{verb} {done.blobs} blobs, {done.bytes} bytes; found {done.adopted} unknown")


@with_settings(*CATALOG_FLAGS)
def migrate(settings: Settings, as_json: JsonFlag = False) -> None:
    """Bring the database to the tables of this version; a server does so too when it starts."""
    from prefixd.store.db.database import open_database
    from prefixd.store.db.migrate import revision, upgrade

    with refusals():
        database = open_database(settings.catalog_url)
        before = revision(database)
        upgrade(database)
        after = revision(database)
        database.dispose()
    if as_json:
        print_json({"from": before, "to": after})
    else:
        typer.echo(f"the database was at revision {before or 'none'} and is at {after}")


@with_settings(*CATALOG_FLAGS)
def copy(
    settings: Settings,
    to_data_dir: Annotated[
        Path | None,
        typer.Option(envvar="PREFIXD_COPY_TO_DATA_DIR", help="Folder of the copy."),
    ] = None,
    to_database_url: Annotated[
        str | None,
        typer.Option(
            envvar="PREFIXD_COPY_TO_DATABASE_URL", help="Default: an SQLite file in that folder."
        ),
    ] = None,
    to_blobs_url: Annotated[
        str | None,
        typer.Option(
            envvar="PREFIXD_COPY_TO_BLOBS_URL", help="s3://bucket/prefix. Default: that folder."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy the whole store to an empty place: a back-up, or a move to PostgreSQL and S3."""
    if to_data_dir is None and (to_database_url is None or to_blobs_url is None):
        fail("--to-data-dir, or both --to-database-url and --to-blobs-url, say where to copy to")
    target = settings.model_copy(
        update={
            "data_dir": to_data_dir or settings.data_dir,
            "database_url": None if to_database_url is None else SecretStr(to_database_url),
            "blobs_url": to_blobs_url,
        }
    )
    from prefixd.store.copying import copy_store

    with refusals(), _place(settings) as here, _place(target) as there:
        done = copy_store(here, there)
    if as_json:
        print_json(asdict(done))
    else:
        rows = sum(done.rows.values())
        typer.echo(f"copied {rows} rows and {done.blobs} blobs of {done.bytes} bytes")
    for key in done.corrupt:
        typer.echo(f"prefixd: left out, corrupt or gone: {key.tenant} {key.digest}", err=True)


@contextmanager
def _place(settings: Settings) -> Iterator["Place"]:
    from prefixd.server.tenants import tables  # noqa: F401 - known from here on, and copied too
    from prefixd.store.blobs.blobs import open_blobs
    from prefixd.store.copying import Place
    from prefixd.store.db.database import open_database

    database = open_database(settings.catalog_url)
    try:
        yield Place(database, open_blobs(settings.blobs_url, settings.root))
    finally:
        database.dispose()
