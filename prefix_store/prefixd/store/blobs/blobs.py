"""Blobs: the bytes of artifacts, keyed by tenant and digest. One contract, two drivers.

Equal bytes of two tenants are two blobs: with a shared one, the duration of an upload would tell
each tenant what the other has.

``LocalBlobs`` lays them out as::

    root/.tmp/4f1c…               being written, locked; unlocked: an interrupted upload
    root/acme/3a/3a7bd3e2…        a blob of tenant acme: link of a temporary file, never overwritten
    root/.quarantine/acme/3a/3a…  the bytes of a blob that no longer had its digest
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Protocol

from prefixd.store.errors import BlobStoreRefused
from prefixd.store.files import (
    IrregularFile,
    file_in_progress,
    fsync_directory,
    interrupted,
    make_directories,
    open_regular,
    remove_interrupted,
    replace,
    set_aside,
    sha256_of,
)
from prefixd.store.names import BlobKey, corrupt, irregular, missing, unreadable

DEFAULT_TIMEOUT_S = 3.0
"""How long a bucket may take to connect, to respond to a request or a part of an upload, and to
continue a download."""


class Blobs(Protocol):
    """Immutable bytes, shared by any number of threads and processes.

    A tenant id or digest that is not safe as a path raises InvalidReference or UnknownPrefix; every
    method raises BlobsUnavailable when the place cannot be reached.
    """

    @property
    def num_failures(self) -> int:
        """Requests to a remote place that failed; 0 for a local one."""

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh local path to write a blob to before ``put``; removed at the end of the block."""

    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        """Make the staged and fsynced file ``source`` the blob of ``digest``; durable on return.

        An existing blob is kept, unless it is corrupt: then ``source`` replaces it. ``source`` may
        be gone afterwards.
        """

    def fetch(self, *, tenant: str, digest: str) -> Path:
        """A local file with the blob's bytes, their digest verified now.

        Raises UnknownPrefix when there is none, CorruptArtifact when its bytes changed.
        """

    def quarantine(self, *, tenant: str, digest: str) -> None:
        """Keep a copy of a corrupt blob's bytes for inspection, before a ``put`` repairs it.

        The blob itself stays: moving it could remove one that another process just repaired.
        """

    def delete(self, *, tenant: str, digest: str) -> None:
        """Remove a blob; durable on return. A missing one is ignored."""

    def walk(self) -> Iterator[tuple[BlobKey, int]]:
        """Every blob and its size in bytes, in no order."""

    def measure(self, *, tenant: str, digest: str) -> tuple[int, str]:
        """The size in bytes and the digest of what is stored as this blob, read now, no copy.

        Raises UnknownPrefix when there is none, CorruptArtifact when it is not a regular file or
        cannot be read.
        """

    def quarantined(self) -> Iterator[BlobKey]:
        """The blobs of which corrupt bytes are kept."""

    def interrupted(self) -> Iterator[str]:
        """The names of uploads and downloads in progress whose process has ended."""

    def remove_interrupted(self) -> None:
        """Remove the local files of interrupted uploads and downloads."""

    def tidy(self, *, before: datetime) -> None:
        """Remove all that interrupted uploads and downloads have left, and the local copies of
        remote blobs that were not used since ``before``."""


def open_blobs(url: str | None, root: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Blobs:
    """The blobs at ``url``: None for files under ``root``, or ``s3://bucket/prefix``.

    A bucket that makes no progress for ``timeout_s`` counts as unavailable. S3 takes endpoint,
    region and credentials from the usual ``AWS_*`` variables, and keeps its local copies under
    ``root``. Raises BlobStoreRefused for a place that cannot be used.
    """
    if url is None:
        return LocalBlobs(root / "blobs")
    if not url.startswith("s3://"):
        raise BlobStoreRefused("expected a blobs URL of the form s3://bucket/prefix")
    try:
        # An optional extra: local files need no S3 client.
        from prefixd.store.blobs.s3 import S3Blobs  # noqa: PLC0415
    except ImportError as error:
        raise BlobStoreRefused("S3 needs the package obstore: pip install 'prefixd[s3]'") from error
    return S3Blobs(url, local=root / "blob-copies", timeout_s=timeout_s)


class LocalBlobs:
    """Blobs under one directory; see ``Blobs``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / ".tmp"

    def __repr__(self) -> str:
        return f"LocalBlobs({str(self._root)!r})"

    @property
    def num_failures(self) -> int:
        return 0

    @contextmanager
    def staging(self) -> Iterator[Path]:
        make_directories(self._staging)
        with file_in_progress(self._staging) as (path, _):
            yield path

    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        target = self._root / BlobKey(tenant, digest).place
        make_directories(target.parent)
        while not _linked(source, target):
            # A blob that is deleted while it is read counts as absent: link again.
            with suppress(FileNotFoundError):
                if not _holds(target, digest):
                    replace(source, target)
                break
        # Also when another publisher linked it: that one may not have called fsync yet.
        fsync_directory(target.parent)

    def fetch(self, *, tenant: str, digest: str) -> Path:
        path = self._root / BlobKey(tenant, digest).place
        try:
            actual = sha256_of(path)
        except FileNotFoundError:
            raise missing(digest) from None
        except IrregularFile as error:
            raise irregular(digest) from error
        if actual != digest:
            raise corrupt(digest, actual)
        return path

    def quarantine(self, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        copy = self._root / ".quarantine" / place
        make_directories(copy.parent)
        with suppress(FileNotFoundError, IrregularFile), open_regular(self._root / place):
            _linked(self._root / place, copy)

    def delete(self, *, tenant: str, digest: str) -> None:
        path = self._root / BlobKey(tenant, digest).place
        with suppress(FileNotFoundError):
            try:
                path.unlink()
            except IsADirectoryError:
                set_aside(path)
            fsync_directory(path.parent)

    def walk(self) -> Iterator[tuple[BlobKey, int]]:
        for path in self._root.glob("*/*/*"):
            key = BlobKey.at(path.relative_to(self._root).as_posix())
            with suppress(FileNotFoundError):
                if key is not None:
                    yield key, path.lstat().st_size

    def measure(self, *, tenant: str, digest: str) -> tuple[int, str]:
        path = self._root / BlobKey(tenant, digest).place
        try:
            actual = sha256_of(path)
            return path.lstat().st_size, actual
        except FileNotFoundError:
            raise missing(digest) from None
        except IrregularFile as error:
            raise irregular(digest) from error
        except OSError as error:
            raise unreadable(digest, error) from error

    def quarantined(self) -> Iterator[BlobKey]:
        folder = self._root / ".quarantine"
        for path in folder.glob("*/*/*"):
            key = BlobKey.at(path.relative_to(folder).as_posix())
            if key is not None:
                yield key

    def interrupted(self) -> Iterator[str]:
        for path in interrupted(self._staging):
            yield str(path)

    def remove_interrupted(self) -> None:
        remove_interrupted(self._staging)

    def tidy(self, *, before: datetime) -> None:
        del before  # it has no copies
        self.remove_interrupted()


def _holds(path: Path, digest: str) -> bool:
    """Whether there is a regular file with this digest."""
    try:
        return sha256_of(path) == digest
    except IrregularFile:
        return False


def _linked(source: Path, target: Path) -> bool:
    """Link ``target`` to ``source``; False when ``target`` exists already."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True
