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
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from prefixd.store.errors import (
    BLOBS_UNAVAILABLE,
    BlobStoreRefused,
    BlobsUnavailable,
    CorruptArtifact,
)
from prefixd.store.files import (
    file_in_progress,
    interrupted,
    make_directories,
    remove_interrupted,
    remove_older,
    sha256_of,
)
from prefixd.store.names import BlobKey, corrupt, missing

if TYPE_CHECKING:  # its stubs only
    from obstore import Bytes, ObjectMeta

SINGLE_PUT_BYTES = 8 * 1024 * 1024
"""Larger blobs are uploaded in parts, so that none is in memory as a whole."""

STAGED_LIFETIME = timedelta(hours=1)
"""An upload names its staged object within seconds; an older one belongs to an interrupted one."""

_READ_BYTES = 1024 * 1024
_PARTS = 2  # in memory at once, of 5 MiB each
_STAGING = ".staging"
_QUARANTINE = ".quarantine"

_log = getLogger("prefixd.store")


@contextmanager
def _reached() -> Iterator[None]:
    """Raise BlobsUnavailable when the bucket fails. The reason, which names the endpoint, is logged
    only."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except BaseError as error:
        _log.error("the bucket failed: %s", _first_line(error))
        raise BlobsUnavailable(BLOBS_UNAVAILABLE) from error


class S3Blobs:
    """Blobs under one prefix of a bucket; see ``prefixd.store.blobs.blobs.Blobs``.

    ``url`` is ``s3://bucket/prefix``; endpoint, region and credentials come from the usual
    ``AWS_*`` variables. Raises BlobStoreRefused when the bucket cannot be used or does not keep
    the condition of a conditional create: there, concurrent writers replace each other's blobs.
    """

    def __init__(self, url: str, *, local: Path) -> None:
        self._url = url
        self._local = local
        self._staging = local / ".tmp"
        make_directories(self._staging)
        self._store = _open(url)
        self._check_conditions()

    def __repr__(self) -> str:
        return f"S3Blobs({self._url!r})"

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with file_in_progress(self._staging) as (path, _):
            yield path

    @_reached()
    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        self._create(source, place)
        # The bytes are read back: not every bucket verifies the checksum of an upload, and a blob
        # that existed already may be corrupt.
        try:
            self._download(place, digest)
        except CorruptArtifact:
            obstore.put(self._store, place, source, max_concurrency=_PARTS)
            self._download(place, digest)

    @_reached()
    def fetch(self, *, tenant: str, digest: str) -> Path:
        place = BlobKey(tenant, digest).place
        copy = self._local / place
        with suppress(FileNotFoundError):
            if sha256_of(copy) == digest:
                os.utime(copy)  # in use: see ``tidy``
                return copy
        return self._download(place, digest)

    @_reached()
    def quarantine(self, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        with suppress(FileNotFoundError):
            obstore.copy(self._store, place, f"{_QUARANTINE}/{place}")

    @_reached()
    def delete(self, *, tenant: str, digest: str) -> None:
        place = BlobKey(tenant, digest).place
        with suppress(FileNotFoundError):
            obstore.delete(self._store, place)
        (self._local / place).unlink(missing_ok=True)

    def walk(self) -> Iterator[tuple[BlobKey, int]]:
        for entry in self._list():
            key = BlobKey.at(entry["path"])
            if key is not None:
                yield key, entry["size"]

    @_reached()
    def measure(self, *, tenant: str, digest: str) -> tuple[int, str]:
        hashed, size = hashlib.sha256(), 0
        try:
            for chunk in self._chunks(BlobKey(tenant, digest).place):
                hashed.update(chunk)
                size += len(chunk)
        except FileNotFoundError:
            raise missing(digest) from None
        return size, hashed.hexdigest()

    def quarantined(self) -> Iterator[BlobKey]:
        for entry in self._list(_QUARANTINE):
            key = BlobKey.at(entry["path"].removeprefix(f"{_QUARANTINE}/"))
            if key is not None:
                yield key

    def interrupted(self) -> Iterator[str]:
        for path in interrupted(self._staging):
            yield str(path)
        for entry in self._interrupted_objects():
            yield f"{self._url}/{entry['path']}"

    @_reached()
    def tidy(self, *, before: datetime) -> None:
        remove_interrupted(self._staging)
        remove_older(self._local, before=before, skipped=self._staging)
        for entry in self._interrupted_objects():
            with suppress(FileNotFoundError):
                obstore.delete(self._store, entry["path"])

    def _interrupted_objects(self) -> "Iterator[ObjectMeta]":
        """Staged objects whose upload has ended without removing them."""
        oldest = datetime.now(UTC) - STAGED_LIFETIME
        return (entry for entry in self._list(_STAGING) if entry["last_modified"] < oldest)

    def _list(self, prefix: str | None = None) -> "Iterator[ObjectMeta]":
        with _reached():
            for page in obstore.list(self._store, prefix=prefix):
                yield from page

    def _chunks(self, place: str) -> "Iterator[Bytes]":
        yield from obstore.get(self._store, place).stream(min_chunk_size=_READ_BYTES)

    def _create(self, source: Path, place: str) -> None:
        """Upload ``source`` unless there is such a blob already."""
        with suppress(AlreadyExistsError):
            if source.stat().st_size <= SINGLE_PUT_BYTES:
                obstore.put(self._store, place, source.read_bytes(), mode="create")
                return
            # An upload in parts cannot be conditional, but a copy within the bucket can.
            staged = f"{_STAGING}/{secrets.token_hex(16)}"
            obstore.put(self._store, staged, source, max_concurrency=_PARTS)
            try:
                obstore.copy(self._store, staged, place, overwrite=False)
            finally:
                obstore.delete(self._store, staged)

    def _download(self, place: str, digest: str) -> Path:
        """Download a blob and verify it; raise UnknownPrefix, CorruptArtifact."""
        hashed = hashlib.sha256()
        with self.staging() as staged:
            try:
                with staged.open("wb") as file:
                    for chunk in self._chunks(place):
                        hashed.update(chunk)
                        file.write(chunk)
            except FileNotFoundError:
                raise missing(digest) from None
            if hashed.hexdigest() != digest:
                raise corrupt(digest, hashed.hexdigest())
            copy = self._local / place
            make_directories(copy.parent)
            staged.replace(copy)
        return copy

    def _check_conditions(self) -> None:
        """Create the same object twice; the second time must fail."""
        probe = f"{_STAGING}/probe-{secrets.token_hex(16)}"
        try:
            obstore.put(self._store, probe, b"prefixd", mode="create")
            obstore.put(self._store, probe, b"prefixd", mode="create")
        except AlreadyExistsError:
            return
        except (BaseError, OSError) as error:
            raise BlobStoreRefused(
                f"the bucket {self._url} cannot be used: {_first_line(error)}"
            ) from error
        finally:
            with suppress(BaseError, OSError):  # ``tidy`` removes what remains
                obstore.delete(self._store, probe)
        raise BlobStoreRefused(
            f"the bucket {self._url} ignores If-None-Match: it let an object that exists be "
            "created again. prefixd relies on that condition; use a store that keeps it"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _open(url: str) -> S3Store:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return S3Store.from_url(
            url,
            config={"copy_if_not_exists": "multipart"},
            # Plain HTTP only where the operator configured it.
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=5),
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        )
    except (BaseError, ValueError) as error:
        raise BlobStoreRefused(f"cannot open the blobs at {url}: {error}") from error
