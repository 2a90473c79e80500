"""Digests: the sha256 of an artifact file in hexadecimal, which is also a blob's name."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from prefixd.store.errors import CorruptArtifact, UnknownPrefix, quoted
from prefixd.store.names import check_tenant

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class BlobKey:
    """Whose blob, and which: equal bytes of two tenants are two blobs."""

    tenant: str
    digest: str

    @property
    def place(self) -> str:
        """Relative path or key of the blob; raise InvalidReference, UnknownPrefix."""
        check_tenant(self.tenant)
        if _DIGEST.fullmatch(self.digest) is None:
            raise UnknownPrefix(f"a digest is 64 hexadecimal characters; got {quoted(self.digest)}")
        return f"{self.tenant}/{self.digest[:2]}/{self.digest}"

    @classmethod
    def at(cls, place: str) -> "BlobKey | None":
        """The key whose ``place`` this is; None for anything else that lies around."""
        match place.split("/"):
            case [tenant, start, digest] if _DIGEST.fullmatch(digest) and digest.startswith(start):
                return cls(tenant, digest)
        return None


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt(digest: str, found: str) -> CorruptArtifact:
    """What to raise when the bytes stored as ``digest`` turn out to have the digest ``found``."""
    return CorruptArtifact(
        f"the artifact stored as {digest} now has the digest {found}; upload it again"
    )


def missing(digest: str) -> UnknownPrefix:
    """What to raise when there are no bytes for ``digest``."""
    return UnknownPrefix(f"no artifact has the digest {digest}")
