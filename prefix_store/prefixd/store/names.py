"""Names, aliases, references and keys of blobs: checked once, into a stronger type."""

import re
from dataclasses import dataclass

from prefixd.store.errors import CorruptArtifact, InvalidReference, UnknownPrefix, quoted

LATEST = "latest"
"""The alias that every upload moves: the version a bare name means, kept for each base."""

MAX_VERSION = 2**31 - 1
"""Largest version number a catalog column holds."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""The regular expression of names, aliases and tenants."""

REFERENCE = rf"^{NAME}(@{NAME})?$"
"""The pattern of prefix references."""

_NAME = re.compile(NAME)
_RULE = "1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed ``name``, ``name@3`` or ``name@alias``; a bare name means ``latest``."""

    name: str
    alias: str | None = LATEST
    version: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class BlobKey:
    """The tenant and the digest of a blob: equal bytes of two tenants are two blobs. The digest is
    the sha256 of the artifact file, in hexadecimal."""

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
        """The key whose ``place`` this is; None for any other file."""
        match place.split("/"):
            case [tenant, start, digest] if _DIGEST.fullmatch(digest) and start == digest[:2]:
                return cls(tenant, digest)
        return None


def corrupt(digest: str, actual: str) -> CorruptArtifact:
    """The error for bytes stored as ``digest`` whose digest is now ``actual``."""
    return CorruptArtifact(
        f"the artifact stored as {digest} now has the digest {actual}; upload it again"
    )


def irregular(digest: str) -> CorruptArtifact:
    """The error for something else than a regular file in the place of a blob."""
    return CorruptArtifact(
        f"the artifact stored as {digest} is no regular file any more; upload it again"
    )


def unreadable(digest: str, error: OSError) -> CorruptArtifact:
    """The error for a blob that the disk does not return."""
    return CorruptArtifact(f"the artifact stored as {digest} cannot be read: {error.strerror}")


def missing(digest: str) -> UnknownPrefix:
    """The error for a digest without bytes."""
    return UnknownPrefix(f"no artifact has the digest {digest}")


def check_name(name: str) -> str:
    """Return ``name`` or raise InvalidReference."""
    if _NAME.fullmatch(name) is None:
        raise InvalidReference(f"a prefix name must be {_RULE}; got {quoted(name)}")
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` when it is not ``latest`` and may be set, or raise InvalidReference."""
    if _NAME.fullmatch(alias) is None:
        raise InvalidReference(f"an alias must be {_RULE}; got {quoted(alias)}")
    if alias.isdigit():
        raise InvalidReference(
            f"an alias must not be all digits, which would read as a version; got {quoted(alias)}"
        )
    if alias == LATEST:
        raise InvalidReference("the alias 'latest' cannot be removed; set it to another version")
    return alias


def check_tenant(tenant: str) -> str:
    """Return ``tenant`` when it is safe as the name of a directory, or raise InvalidReference."""
    if _NAME.fullmatch(tenant) is None:
        raise InvalidReference(f"a tenant id must be {_RULE}; got {quoted(tenant)}")
    return tenant


def parse_reference(reference: str) -> Reference:
    """Parse ``name``, ``name@3`` or ``name@alias``; raise InvalidReference when malformed."""
    name, at, selector = reference.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _NAME.fullmatch(selector) is None:
        raise InvalidReference(
            f"after @ comes a version number or an alias ({_RULE}); got {quoted(selector)}"
        )
    if selector.isdigit():
        return Reference(name, alias=None, version=int(selector))
    return Reference(name, alias=selector)


def selected(name: str, version: int | str) -> Reference:
    """The reference to a version of ``name``: its number, or an alias or a number as text. Raises
    InvalidReference when malformed."""
    if isinstance(version, str):
        return parse_reference(f"{name}@{version}")
    return Reference(check_name(name), alias=None, version=version)
