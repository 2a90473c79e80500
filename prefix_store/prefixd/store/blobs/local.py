"""Blobs on local files.

::

    root/.tmp/4f1c…               being written; what a crash leaves here was never acknowledged
    root/acme/3a/3a7bd3e2…        a blob of tenant acme: link of a temporary file, never overwritten
    root/.quarantine/acme/3a/3a…  what a blob was when it no longer had its digest
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from prefixd.store.blobs.durable import fsync_directory, make_directories
from prefixd.store.digest import BlobKey, corrupt, missing, sha256_of


class LocalBlobs:
    """Blobs under one directory; see ``prefixd.store.blobs.blobs.Blobs``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / ".tmp"
        make_directories(self._staging)

    def __repr__(self) -> str:
        return f"LocalBlobs({str(self._root)!r})"

    @contextmanager
    def staging(self) -> Iterator[Path]:
        path = self._staging / secrets.token_hex(16)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        target = self._path(tenant, digest)
        make_directories(target.parent)
        while not _linked(source, target):
            # A blob that is deleted while it is looked at is absent: link once more.
            with suppress(FileNotFoundError):
                if sha256_of(target) != digest:
                    source.replace(target)
                break
        # Also when another publisher linked it: it may not have come to its fsync yet.
        fsync_directory(target.parent)

    def fetch(self, *, tenant: str, digest: str) -> Path:
        path = self._path(tenant, digest)
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            raise missing(digest) from None
        if found != digest:
            raise corrupt(digest, found)
        return path

    def quarantine(self, *, tenant: str, digest: str) -> None:
        path = self._path(tenant, digest)
        aside = self._root / ".quarantine" / path.relative_to(self._root)
        make_directories(aside.parent)
        with suppress(FileNotFoundError):
            _linked(path, aside)

    def delete(self, *, tenant: str, digest: str) -> None:
        path = self._path(tenant, digest)
        with suppress(FileNotFoundError):
            path.unlink()
            fsync_directory(path.parent)

    def walk(self) -> Iterator[tuple[BlobKey, int]]:
        for path in self._root.glob("*/*/*"):
            key = BlobKey.at(path.relative_to(self._root).as_posix())
            with suppress(FileNotFoundError):
                if key is not None:
                    yield key, path.stat().st_size

    def tidy(self, *, before: datetime) -> None:
        remove_older(self._staging, before=before)

    def _path(self, tenant: str, digest: str) -> Path:
        return self._root / BlobKey(tenant, digest).place


def remove_older(directory: Path, *, before: datetime) -> None:
    """Remove the files under ``directory`` that were last written or touched before ``before``."""
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < before.timestamp():
                path.unlink()


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True
