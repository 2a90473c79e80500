"""What the store can refuse.

::

    StoreError
    ├── ArtifactRefused      the uploaded bytes are not a prefix for this base
    ├── InvalidReference     a name, alias or reference is malformed
    ├── UnknownPrefix        no such name, version or alias for this tenant
    ├── CorruptArtifact      stored bytes no longer have the digest they were stored under
    ├── BlobsUnavailable     the place for blobs cannot be reached now
    ├── BlobStoreRefused     the configured place for blobs cannot be trusted with them
    ├── SchemaRefused        the database was changed by a later version of prefixd
    └── CopyRefused          the place to copy to holds something already

``str(error)`` is a sentence for the caller. It never depends on another tenant's things.
"""

BLOBS_AWAY = "the store of prefixes cannot be reached; try again in a while"
"""What BlobsUnavailable says."""

_SHOWN_CHARACTERS = 80


class StoreError(Exception):
    """Base of everything the store refuses."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ArtifactRefused(StoreError):
    """The uploaded bytes are not a prefix for this base.

    ``code`` is a word for machines (docs/formats.md lists them), ``param`` names the part of the
    upload or the field of it that is at fault, ``message`` says what was expected and what came.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class InvalidReference(StoreError):
    """A name, alias or reference is malformed."""


class UnknownPrefix(StoreError):
    """No such name, version or alias for this tenant; another tenant's reads exactly the same."""


class CorruptArtifact(StoreError):
    """Stored bytes no longer have the digest they were stored under."""


class BlobsUnavailable(StoreError):
    """The place for blobs cannot be reached now; the same may work later."""


class BlobStoreRefused(StoreError):
    """The configured place for blobs cannot be trusted with them. For the operator, at start."""


class SchemaRefused(StoreError):
    """The database was changed by a later version of prefixd. For the operator, at start."""


class CopyRefused(StoreError):
    """The place to copy to holds something already. For the operator."""


def quoted(text: str) -> str:
    """Somebody else's string, safe in a message: ASCII only, escaped, and cut to 80 characters."""
    if len(text) <= _SHOWN_CHARACTERS:
        return ascii(text)
    return f"{text[:_SHOWN_CHARACTERS]!a}… ({len(text)} characters)"
