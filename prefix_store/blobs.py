"""Blobs on local files, keyed by tenant and digest.

::

    root/.tmp/4f1c…          being written; what a crash leaves here was never acknowledged
    root/acme/3a/3a7bd3e2…   a blob of tenant acme: link of a temporary file, never overwritten

Tenants are kept apart even for equal bytes: one blob shared by two would tell each, by the time an
upload takes, what the other has.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefix_store.durable import fsync_directory, make_directories
from prefix_store.errors import CorruptArtifact, UnknownPrefix, quoted
from prefix_store.names import check_tenant

_DIGEST = re.compile(r"[0-9a-f]{64}")


class LocalBlobs:
    """Blobs under one directory, shared by any number of threads and processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / ".tmp"
        make_directories(self._staging)

    def __repr__(self) -> str:
        return f"LocalBlobs({str(self._root)!r})"

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh path to write a blob to before ``put``; gone at the end of the block."""
        path = self._staging / secrets.token_hex(16)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, source: Path, *, tenant: str, digest: str) -> None:
        """Make the staged and fsynced file ``source`` the blob of ``digest``; durable on return.

        When the blob is there already it stays, unless it is corrupt: then the good bytes at hand
        take its place.
        """
        target = self._path(tenant, digest)
        make_directories(target.parent)
        try:
            os.link(source, target)
        except FileExistsError:
            if _sha256(target) != digest:
                source.replace(target)
        # Also when another publisher linked it: it may not have come to its fsync yet.
        fsync_directory(target.parent)

    def fetch(self, *, tenant: str, digest: str) -> Path:
        """The file of a blob, its digest verified now.

        Raises UnknownPrefix when there is none, CorruptArtifact when its bytes changed.
        """
        path = self._path(tenant, digest)
        try:
            found = _sha256(path)
        except FileNotFoundError:
            raise UnknownPrefix(f"no artifact has the digest {digest}") from None
        if found != digest:
            raise CorruptArtifact(
                f"the artifact stored as {digest} now has the digest {found}; upload it again"
            )
        return path

    def _path(self, tenant: str, digest: str) -> Path:
        check_tenant(tenant)
        if _DIGEST.fullmatch(digest) is None:
            raise UnknownPrefix(f"a digest is 64 hexadecimal characters; got {quoted(digest)}")
        return self._root / tenant / digest[:2] / digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
