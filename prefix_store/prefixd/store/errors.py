"""Errors of the store.

::

    StoreError
    ├── ArtifactRefused      the uploaded bytes are not a prefix for this base
    ├── InvalidReference     a name, alias or reference is malformed
    ├── UnknownPrefix        no such name, version or alias for this tenant
    ├── UnknownFile          no such file of this tenant
    ├── BaseMismatch         the prefix belongs to another base than the one served
    ├── VersionInUse         an alias or a pin refers to the version
    ├── MemberDeleted        versions that a stack, blend or ensemble is made of are gone
    ├── CorruptArtifact      stored bytes no longer have the digest they were stored under
    ├── BlobsUnavailable     the place for blobs cannot be reached now
    ├── StorageFull          the disk has no room for an upload
    ├── BlobStoreRefused     the configured place for blobs cannot be used safely
    ├── DataFolderRefused    the data folder cannot be used
    ├── SchemaRefused        the database was changed by a later version of prefixd
    ├── BackupRefused        a backup that is damaged, or that cannot be made there
    └── CopyRefused          the place to copy to is not empty

``str(error)`` is a message for the caller. It never depends on another tenant's data.
"""

BLOBS_UNAVAILABLE = "the store of prefixes cannot be reached; try again later"
"""The message of BlobsUnavailable."""

_SHOWN_CHARACTERS = 80


class StoreError(Exception):
    """Base of all errors of the store."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ArtifactRefused(StoreError):
    """The uploaded bytes are not a prefix for this base.

    ``code`` is for programs (docs/formats.md lists all codes), ``param`` names the part or field of
    the upload that was refused, ``message`` says what was expected and what was received.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class InvalidReference(StoreError):
    """A name, alias or reference is malformed."""


class UnknownPrefix(StoreError):
    """No such name, version or alias for this tenant; another tenant's gives the same message."""


class UnknownFile(StoreError):
    """No such file of this tenant; another tenant's gives the same message."""


class BaseMismatch(StoreError):
    """The prefix belongs to another base than the one served; the message names both."""


class VersionInUse(StoreError):
    """An alias or a pin refers to the version, which therefore cannot be deleted."""


class MemberDeleted(StoreError):
    """Versions that a stack, a blend or an ensemble is made of were deleted."""


class CorruptArtifact(StoreError):
    """Stored bytes no longer have the digest they were stored under."""


class BlobsUnavailable(StoreError):
    """The place for blobs cannot be reached now; the same may work later."""


class StorageFull(StoreError):
    """The disk has no room for an upload; removing prefixes helps."""


class BlobStoreRefused(StoreError):
    """The configured place for blobs cannot be used safely. For the operator, at start."""


class DataFolderRefused(StoreError):
    """The data folder cannot be used. For the operator, at start."""


class SchemaRefused(StoreError):
    """The database was changed by a later version of prefixd. For the operator, at start."""


class BackupRefused(StoreError):
    """A backup that is damaged or incomplete, or that cannot be made there. For the operator."""


class CopyRefused(StoreError):
    """The place to copy to is not empty. For the operator."""


def quoted(text: str) -> str:
    """Uploaded text, safe in a message: ASCII only, escaped, and cut to 80 characters."""
    if len(text) <= _SHOWN_CHARACTERS:
        return ascii(text)
    return f"{text[:_SHOWN_CHARACTERS]!a}… ({len(text)} characters)"
