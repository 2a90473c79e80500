"""Blobs in an S3-compatible bucket, with local copies of what is in use.

::

    s3://bucket/prefix/acme/3a/3a7bd3e2…              a blob of tenant acme, created, never replaced
    s3://bucket/prefix/.staging/4f1c…                 a large upload before it has its name
    s3://bucket/prefix/.quarantine/acme/3a/3a7bd3e2…  the bytes of a blob with another digest
    local/.tmp/4f1c…                                  being written or downloaded
    local/acme/3a/3a7bd3e2…                           a copy of a blob, verified at every use
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.exceptions import AlreadyExistsError

from prefixd.store.blobs.bucket import Bucket, first_line
from prefixd.store.errors import BlobStoreRefused, BlobsUnavailable, CorruptArtifact
from prefixd.store.files import (
    IrregularFile,
    file_in_progress,
    interrupted,
    make_directories,
    remove_interrupted,
    remove_irregular,
    remove_older,
    replace,
    sha256_of,
)
from prefixd.store.names import BlobKey, corrupt, missing

if TYPE_CHECKING:  # its stubs only
    from obstore import ObjectMeta

SINGLE_PUT_BYTES = 5 * 1024 * 1024
"""Larger blobs are uploaded in parts, so that none is in memory as a whole."""

STAGED_LIFETIME = timedelta(hours=1)
"""An upload names its staged object within seconds; an older one belongs to an interrupted one."""

_STAGING = ".staging"
_QUARANTINE = ".quarantine"


class S3Blobs:
    """Blobs under one prefix of a bucket; see ``prefixd.store.blobs.blobs.Blobs``.

    ``url`` is ``s3://bucket/prefix``; endpoint, region and credentials come from the usual
    ``AWS_*`` variables. Raises BlobStoreRefused when the bucket cannot be used or does not keep
    the condition of a conditional create: there, concurrent writers replace each other's blobs.
    """

    def __init__(self, url: str, *, local: Path, timeout_s: float) -> None:
        self._url = url
        self._local = local
        self._staging = local / ".tmp"
        make_directories(self._staging)
        self._bucket = Bucket(url, timeout_s=timeout_s)
        self._check_conditions()

    def __repr__(self) -> str:
        return f"S3Blobs({self._url!r})"

    @property
    def num_failures(self) -> int:
        return self._bucket.circuit.failures

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with file_in_progress(self._staging) as (path, _):
            yield path

    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        self._create(source, place)
        # The bytes are read back: not every bucket verifies the checksum of an upload, and a blob
        # that existed already may be corrupt.
        try:
            self._download(place, digest)
        except CorruptArtifact:
            self._bucket.put(place, source)
            self._download(place, digest)

    def fetch(self, *, tenant: str, digest: str) -> Path:
        place = BlobKey(tenant, digest).place
        copy = self._local / place
        with suppress(FileNotFoundError, IrregularFile):
            if sha256_of(copy) == digest:
                os.utime(copy)  # in use: see ``tidy``
                return copy
        return self._download(place, digest)

    def quarantine(self, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        with suppress(FileNotFoundError):
            self._bucket.copy(place, f"{_QUARANTINE}/{place}")

    def delete(self, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        with suppress(FileNotFoundError):
            self._bucket.delete(place)
        remove_irregular(self._local / place)
        (self._local / place).unlink(missing_ok=True)

    def walk(self) -> Iterator[tuple[BlobKey, int]]:
        for entry in self._bucket.list():
            key = BlobKey.at(entry["path"])
            if key is not None:
                yield key, entry["size"]

    def measure(self, *, tenant: str, digest: str) -> tuple[int, str]:
        hashed, size = hashlib.sha256(), 0
        try:
            for chunk in self._bucket.chunks(BlobKey(tenant, digest).place):
                hashed.update(chunk)
                size += len(chunk)
        except FileNotFoundError:
            raise missing(digest) from None
        return size, hashed.hexdigest()

    def quarantined(self) -> Iterator[BlobKey]:
        for entry in self._bucket.list(_QUARANTINE):
            key = BlobKey.at(entry["path"].removeprefix(f"{_QUARANTINE}/"))
            if key is not None:
                yield key

    def interrupted(self) -> Iterator[str]:
        for path in interrupted(self._staging):
            yield str(path)
        for entry in self._interrupted_objects():
            yield f"{self._url}/{entry['path']}"

    def remove_interrupted(self) -> None:
        remove_interrupted(self._staging)

    def tidy(self, *, before: datetime) -> None:
        self.remove_interrupted()
        remove_older(self._local, before=before, skipped=self._staging)
        for entry in self._interrupted_objects():
            with suppress(FileNotFoundError):
                self._bucket.delete(entry["path"])

    def _interrupted_objects(self) -> "Iterator[ObjectMeta]":
        """Staged objects whose upload has ended without removing them."""
        oldest = datetime.now(UTC) - STAGED_LIFETIME
        return (entry for entry in self._bucket.list(_STAGING) if entry["last_modified"] < oldest)

    def _create(self, source: Path, place: str) -> None:
        """Upload ``source`` unless there is such a blob already."""
        with suppress(AlreadyExistsError):
            if source.stat().st_size <= SINGLE_PUT_BYTES:
                self._bucket.create(place, source.read_bytes())
                return
            # An upload in parts cannot be conditional, but a copy within the bucket can.
            staged = f"{_STAGING}/{secrets.token_hex(16)}"
            self._bucket.put(staged, source)
            try:
                self._bucket.copy(staged, place, overwrite=False)
            finally:
                with suppress(BlobsUnavailable):  # ``tidy`` removes it
                    self._bucket.delete(staged)

    def _download(self, place: str, digest: str) -> Path:
        """Download a blob and verify it; raise UnknownPrefix, CorruptArtifact."""
        hashed = hashlib.sha256()
        with self.staging() as staged:
            try:
                with staged.open("wb") as file:
                    for chunk in self._bucket.chunks(place):
                        hashed.update(chunk)
                        file.write(chunk)
            except FileNotFoundError:
                raise missing(digest) from None
            if hashed.hexdigest() != digest:
                raise corrupt(digest, hashed.hexdigest())
            copy = self._local / place
            make_directories(copy.parent)
            replace(staged, copy)
        return copy

    def _check_conditions(self) -> None:
        """Create the same object twice; the second time must fail."""
        probe = f"{_STAGING}/probe-{secrets.token_hex(16)}"
        try:
            self._bucket.create(probe, b"prefixd")
            self._bucket.create(probe, b"prefixd")
        except AlreadyExistsError:
            return
        except (BlobsUnavailable, OSError) as error:
            reason = first_line(error.__cause__ or error)
            raise BlobStoreRefused(f"the bucket {self._url} cannot be used: {reason}") from error
        finally:
            with suppress(BlobsUnavailable, OSError):  # ``tidy`` removes what remains
                self._bucket.delete(probe)
        raise BlobStoreRefused(
            f"the bucket {self._url} ignores If-None-Match: it let an object that exists be "
            "created again. prefixd relies on that condition; use a store that keeps it"
        )
