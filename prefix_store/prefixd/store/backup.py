"""Backups: a folder with a copy of the whole store, which looks finished only when it is.

::

    today/backup.json        written last: what the backup has, and the digest of its catalog
    today/catalog.sqlite3    every table, from SQLite or PostgreSQL
    today/blobs/acme/3a/…    the blobs of all versions, from files or a bucket
    today.partial-4f1c…      a backup in progress, or an interrupted one
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.copying import CopyResult, Place, copy_store, referenced
from prefixd.store.db.database import open_database, reading, utc_now
from prefixd.store.db.migrate import HEAD, upgrade
from prefixd.store.errors import BackupRefused, CorruptArtifact, UnknownPrefix
from prefixd.store.files import (
    IrregularFile,
    copy_durably,
    fsync_directory,
    open_regular,
    sha256_of,
)
from prefixd.store.names import BlobKey

FORMAT = 1
_CATALOG = "catalog.sqlite3"
_MANIFEST = "backup.json"


@dataclass(frozen=True, slots=True)
class BackupManifest:
    """What a backup has. ``corrupt``: blobs that were corrupt or missing when it was made."""

    format: int
    created_at: str
    revision: str
    catalog_sha256: str
    rows: dict[str, int]
    blobs: int
    bytes: int
    corrupt: tuple[BlobKey, ...]

    def to_json(self) -> str:
        """The file ``backup.json``."""
        return json.dumps(asdict(self), indent=2)


def back_up(source: Place, folder: Path) -> CopyResult:
    """Copy the store to ``folder``, which must be absent or empty; servers may go on.

    The rows are those of one moment, and each blob is verified: ``corrupt`` of the result are those
    that are not in the backup. An error or an interruption leaves no ``folder``. Raises
    BackupRefused.
    """
    _check_free(folder)
    partial = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(mode=0o700)
    try:
        with _opened(partial / _CATALOG) as database:
            result = copy_store(source, Place(database, LocalBlobs(partial / "blobs")))
        _write_manifest(partial, result)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_directory(folder.parent)
    return result


def restore(folder: Path, target: Place, *, scratch: Path) -> CopyResult:
    """Copy the backup in ``folder``, which is only read, to an empty store; ``corrupt`` of the
    result were not in the backup.

    All of it is verified first. ``scratch`` is a folder for a copy of its catalog, which is brought
    to the tables of this version. Raises BackupRefused for an incomplete or damaged backup, naming
    what is damaged, and CopyRefused when the store is not empty.
    """
    manifest = read_manifest(folder)
    blobs = LocalBlobs(folder / "blobs")
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".restore-") as name:
        catalog = Path(name) / _CATALOG
        try:
            copy_durably(folder / _CATALOG, catalog)
        except FileNotFoundError:
            raise _damaged(folder, f"{_CATALOG} is missing") from None
        except IrregularFile as error:
            raise _damaged(folder, str(error)) from error
        if sha256_of(catalog) != manifest.catalog_sha256:
            raise _damaged(folder, f"{_CATALOG} has another digest")
        with _opened(catalog) as database:
            upgrade(database)
            _check_blobs(folder, database, blobs, known=frozenset(manifest.corrupt))
            return copy_store(Place(database, blobs), target)


def read_manifest(folder: Path) -> BackupManifest:
    """What the finished backup in ``folder`` has. Raises BackupRefused."""
    try:
        with open_regular(folder / _MANIFEST) as file:
            fields: dict[str, Any] = json.load(file)
        fields["corrupt"] = tuple(BlobKey(**key) for key in fields["corrupt"])
        manifest = BackupManifest(**fields)
    except (FileNotFoundError, NotADirectoryError):
        raise BackupRefused(
            f"expected a finished backup in {folder}; there is no {_MANIFEST} in it"
        ) from None
    except IrregularFile as error:
        raise _damaged(folder, str(error)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, f"{_MANIFEST} is malformed") from error
    if manifest.format != FORMAT:
        raise BackupRefused(
            f"expected a backup of format {FORMAT}; {folder} has format {manifest.format}: restore "
            "it with the version of prefixd that made it, or a later one"
        )
    return manifest


def _damaged(folder: Path, reason: str) -> BackupRefused:
    return BackupRefused(f"the backup {folder} is damaged: {reason}")


@contextmanager
def _opened(file: Path) -> Iterator[Engine]:
    """The SQLite database ``file``, in one file again at the end of the block."""
    database = open_database(f"sqlite:///{file}")
    try:
        yield database
    finally:
        database.dispose()


def _check_free(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise BackupRefused(
            f"expected a name in a folder that exists; there is no folder {folder.parent} to make "
            f"{folder.name} in"
        )
    if folder.is_mount():
        raise BackupRefused(f"expected the name of a new folder; {folder} is a mounted disk")
    if folder.is_symlink():
        raise BackupRefused(f"expected the name of a new folder; {folder} is a symbolic link")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise BackupRefused(f"expected a new or an empty folder; {folder} has something in it")


def _write_manifest(partial: Path, result: CopyResult) -> None:
    catalog = partial / _CATALOG
    manifest = BackupManifest(
        format=FORMAT,
        created_at=utc_now().isoformat(),
        revision=HEAD,
        catalog_sha256=sha256_of(catalog),
        rows=result.rows,
        blobs=result.blobs,
        bytes=result.bytes,
        corrupt=result.corrupt,
    )
    with (partial / _MANIFEST).open("x") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(partial)


def _check_blobs(
    folder: Path, database: Engine, blobs: LocalBlobs, *, known: frozenset[BlobKey]
) -> None:
    """Verify every blob except those ``known`` to be corrupt. Raises BackupRefused."""
    with reading(database) as connection:
        expected = [key for key, _ in referenced(connection) if key not in known]
    damaged = [key for key in expected if not _is_verified(blobs, key)]
    if damaged:
        names = "".join(f"\n  {key.tenant} {key.digest}" for key in damaged)
        raise BackupRefused(
            f"the backup {folder} is damaged, and nothing was restored. Corrupt or missing:{names}"
        )


def _is_verified(blobs: LocalBlobs, key: BlobKey) -> bool:
    try:
        blobs.fetch(tenant=key.tenant, digest=key.digest)
    except (CorruptArtifact, UnknownPrefix):
        return False
    return True
