"""What a server removes at its start and in the background."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import structlog

from prefixd.server.engine.engine import Engine
from prefixd.server.serve.bounds import files_kept
from prefixd.server.serve.catalog import CatalogParts, upload_dir
from prefixd.server.serve.settings import Settings
from prefixd.server.tenants.retention import Expired, remove_expired
from prefixd.store.files import UPLOAD_PREFIX, remove_interrupted
from prefixd.store.gc import GcResult, Sweeper
from prefixd.store.names import BlobKey

log = structlog.get_logger("prefixd")


def prepare_upload_folder(root: Path) -> Path:
    """Create the folder for uploads in flight and remove interrupted uploads from it. Another
    server may share the folder: its uploads are locked, and stay."""
    folder = upload_dir(root)
    folder.mkdir(parents=True, exist_ok=True)
    remove_interrupted(folder, prefix=UPLOAD_PREFIX)
    return folder


def make_sweeper(settings: Settings, catalog: CatalogParts, engine: Engine) -> Sweeper:
    """Removes expired rows, interrupted uploads and deleted prefixes in the background, except
    those that the engine holds."""
    grace, days = timedelta(seconds=settings.gc_grace), settings.audit_days
    audit_kept = None if days is None else timedelta(days=days)

    def sweep() -> GcResult:
        expired = remove_expired(
            catalog.database,
            audit_kept=audit_kept,
            batches_kept=files_kept(settings),
            store=catalog.store.files,
        )
        if expired != Expired():
            log.info("removed expired rows", **asdict(expired))
        held = engine.held_prefixes()
        resident = [BlobKey(key.tenant, digest) for key in held for digest in key.digests]
        return catalog.store.collect(grace=grace, resident=resident)

    def tidy() -> None:
        catalog.store.remove_interrupted()
        remove_interrupted(upload_dir(settings.root), prefix=UPLOAD_PREFIX)

    return Sweeper(sweep, interval_s=settings.gc_interval, tidy=tidy)
