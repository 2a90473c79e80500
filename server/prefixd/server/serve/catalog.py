"""The configured catalog: the store and the tenants' tables over one database.

Imports neither torch nor FastAPI, so the command line opens it without a server.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, event, make_url
from sqlalchemy import Engine as Database

from prefixd.server.errors import PrefixdError
from prefixd.server.serve.data_folder import check_data_folder
from prefixd.server.serve.settings import Settings
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.batches import Batches
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.integrity import BindingIntegrity
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.quotas import DEFAULT_QUOTA, Quota, parse_limit, parse_quota
from prefixd.server.tenants.registry import DEFAULT_SCOPES, Scope, Tenants
from prefixd.store.backup import back_up, restore
from prefixd.store.blobs.blobs import Blobs, open_blobs
from prefixd.store.copying import CopyResult, Place, copy_store
from prefixd.store.db.database import COMMAND_LINE_TIMEOUTS, open_database
from prefixd.store.db.migrate import revision, upgrade
from prefixd.store.db.timeouts import Timeouts
from prefixd.store.disk import DiskGuard
from prefixd.store.errors import StoreError
from prefixd.store.integrity import Finding, StoreIntegrity
from prefixd.store.store import PrefixStore

REPORTED_ERRORS = (PrefixdError, StoreError, OSError, ValueError)
"""Errors whose message tells an operator what was wrong."""


@dataclass(frozen=True, slots=True)
class CatalogParts:
    """Everything durable. ``database`` is what the others share, to be disposed of at the end."""

    database: Database
    store: PrefixStore
    tenants: Tenants
    bindings: Bindings
    batches: Batches
    limiter: Limiter
    audit: AuditLog
    idempotency: Idempotency
    disk: DiskGuard


def open_catalog(settings: Settings, timeouts: Timeouts = COMMAND_LINE_TIMEOUTS) -> CatalogParts:
    """Open the catalog and the blobs; create the tables and folders that are missing. The tables
    are changed with the timeouts of the command line, as that may take long.

    Raises DataFolderRefused.
    """
    check_data_folder(settings.root)
    disk = disk_guard(settings)
    disk.make_room()
    guard = partial(_before_writing, disk)
    migrating = open_database(settings.catalog_url)
    event.listen(migrating, "begin", guard)
    upgrade(migrating)
    migrating.dispose()
    database = open_database(settings.catalog_url, timeouts)
    event.listen(database, "begin", guard)
    return CatalogParts(
        database=database,
        store=PrefixStore(database, _open_blobs(settings)),
        tenants=Tenants(database, default_quota=default_quota(settings)),
        bindings=Bindings(database),
        batches=Batches(database),
        limiter=Limiter(database),
        audit=AuditLog(database),
        idempotency=Idempotency(database),
        disk=disk,
    )


def disk_guard(settings: Settings) -> DiskGuard:
    """The guard of the disks that the settings write to. A catalog on PostgreSQL is on none of
    them, and needs no reserve here."""
    folders = {"data": settings.root}
    blobs = settings.root / "blobs"
    if blobs.is_dir():  # it may be another disk, mounted there
        folders["blobs"] = blobs
    file = make_url(settings.catalog_url)
    local = file.get_backend_name() == "sqlite" and file.database
    reserve = Path(file.database).parent if local and file.database else None
    if reserve is not None and reserve != settings.root:
        folders["catalog"] = reserve
    return DiskGuard(folders, min_free=settings.min_free_bytes, reserve=reserve)


def _before_writing(disk: DiskGuard, connection: Connection) -> None:
    if connection.get_execution_options().get("prefixd_write"):
        disk.make_room()


def default_quota(settings: Settings) -> Quota:
    """The limits of a tenant that is created. Unless the operator sets ``max_bytes``, a tenant may
    store a quarter of the disk at most."""
    chosen, blobs = parse_quota(settings.default_quota or ""), settings.root / "blobs"
    if settings.blobs_url is None and "max_bytes" not in chosen:
        quarter = shutil.disk_usage(blobs if blobs.is_dir() else settings.root).total // 4
        chosen["max_bytes"] = min(quarter, DEFAULT_QUOTA.max_bytes or quarter)
    return replace(DEFAULT_QUOTA, **chosen)


def _open_blobs(settings: Settings) -> Blobs:
    return open_blobs(settings.blobs_url, settings.root, timeout_s=settings.blobs_timeout)


def parse_scopes(words: Sequence[str]) -> Collection[Scope]:
    """The scopes that ``words`` name; no word means those of an ordinary key.

    Raises ValueError for any other word.
    """
    try:
        return [Scope(word) for word in words] or DEFAULT_SCOPES
    except ValueError as error:
        raise ValueError(f"{error}; expected one of {', '.join(Scope)}") from None


def parse_limits(words: Sequence[str]) -> dict[str, int | None]:
    """The limits in words such as ``max_users=1000``. Raises ValueError."""
    return dict(map(parse_limit, words))


def changed_limits(quota: Quota) -> dict[str, int]:
    """The limits that differ from the built-in ones."""
    default = asdict(DEFAULT_QUOTA)
    return {
        name: limit
        for name, limit in asdict(quota).items()
        if limit is not None and limit != default[name]
    }


def migrate_database(settings: Settings) -> tuple[str | None, str | None]:
    """Upgrade the database to the tables of this version; its revision before and after."""
    check_data_folder(settings.root)
    database = open_database(settings.catalog_url)
    try:
        before = revision(database)
        upgrade(database)
        return before, revision(database)
    finally:
        database.dispose()


def copy_catalog(source: Settings, target: Settings) -> CopyResult:
    """Copy database and blobs of the configured catalog to an empty one."""
    with _place(source) as full, _place(target) as empty:
        return copy_store(full, empty)


def back_up_catalog(source: Settings, folder: Path) -> CopyResult:
    """Copy database and blobs of the configured catalog to a new folder. Raises BackupRefused."""
    with _place(source) as full:
        return back_up(full, folder.absolute())


def restore_catalog(folder: Path, target: Settings) -> CopyResult:
    """Copy a backup to the configured catalog, which must be empty. Raises BackupRefused,
    CopyRefused."""
    with _place(target) as empty:
        return restore(folder.absolute(), empty, scratch=target.root)


class Integrity:
    """Checks everything durable that is configured, while servers use it or not."""

    def __init__(self, place: Place, *, upload_dir: Path) -> None:
        self._store = StoreIntegrity(place.database, place.blobs, upload_dir=upload_dir)
        self._bindings = BindingIntegrity(place.database)

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found."""
        yield from self._store.findings()
        yield from self._bindings.findings()

    def counts(self) -> dict[str, int]:
        """How many versions, files, blobs and so on were checked."""
        return {**self._store.counts, **self._bindings.counts}


@contextmanager
def open_integrity(settings: Settings) -> Iterator[Integrity]:
    """The check of the configured catalog and blobs."""
    with _place(settings) as place:
        upgrade(place.database)
        yield Integrity(place, upload_dir=upload_dir(settings.root))


def upload_dir(root: Path) -> Path:
    """The folder for uploads in flight."""
    return root / "uploads"


@contextmanager
def _place(settings: Settings) -> Iterator[Place]:
    check_data_folder(settings.root)
    database = open_database(settings.catalog_url)
    try:
        yield Place(database, _open_blobs(settings))
    finally:
        database.dispose()
