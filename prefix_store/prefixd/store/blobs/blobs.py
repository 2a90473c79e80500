"""Blobs: the bytes of artifacts, keyed by tenant and digest. One contract, two drivers.

Tenants are kept apart even for equal bytes: one blob shared by two would tell each, by the time an
upload takes, what the other has.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from prefixd.store.blobs.local import LocalBlobs
from prefixd.store.digest import BlobKey
from prefixd.store.errors import BlobStoreRefused

__all__ = ["Blobs", "LocalBlobs", "open_blobs"]


class Blobs(Protocol):
    """Immutable bytes, shared by any number of threads and processes.

    A tenant id or digest that could lead elsewhere raises InvalidReference or UnknownPrefix; every
    method raises BlobsUnavailable where the place cannot be reached.
    """

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh local path to write a blob to before ``put``; gone at the end of the block."""

    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        """Make the staged and fsynced file ``source`` the blob of ``digest``; durable on return.

        When the blob is there already it stays, unless it is corrupt: then the good bytes at hand
        take its place. ``source`` may be gone afterwards.
        """

    def fetch(self, *, tenant: str, digest: str) -> Path:
        """A local file with the blob's bytes, their digest verified now.

        Raises UnknownPrefix when there is none, CorruptArtifact when its bytes changed.
        """

    def quarantine(self, *, tenant: str, digest: str) -> None:
        """Keep a corrupt blob's bytes aside for a look, before a ``put`` heals it.

        The blob itself stays: moving it could take away what another process just healed.
        """

    def delete(self, *, tenant: str, digest: str) -> None:
        """Remove a blob; durable on return. One that is not there is fine."""

    def walk(self) -> Iterator[tuple[BlobKey, int]]:
        """Every blob and its size in bytes, in no order."""

    def tidy(self, *, before: datetime) -> None:
        """Remove what no upload or load has used since ``before``: leavings of killed processes,
        local copies of remote blobs."""


def open_blobs(url: str | None, root: Path) -> Blobs:
    """The blobs at ``url``: None for files under ``root``, or ``s3://bucket/prefix``.

    S3 takes endpoint, region and credentials from the usual ``AWS_*`` variables, and keeps its
    local copies under ``root``. Raises BlobStoreRefused for what cannot be trusted with blobs.
    """
    if url is None:
        return LocalBlobs(root / "blobs")
    if not url.startswith("s3://"):
        raise BlobStoreRefused("expected a blobs URL of the form s3://bucket/prefix")
    try:
        # An extra of its own: who stays on files needs no S3 client.
        from prefixd.store.blobs.s3 import S3Blobs  # noqa: PLC0415
    except ImportError as error:
        raise BlobStoreRefused("S3 needs the package obstore: pip install 'prefixd[s3]'") from error
    return S3Blobs(url, local=root / "blob-copies")
