"""Where prefixes come from: what the engine asks of a store, and how a load fails."""

from typing import Protocol

from prefixd.server.engine.request import PrefixKey

STORAGE_UNAVAILABLE = "storage_unavailable"
"""The code of a failure that a retry may cure: the store or the catalog cannot be reached now."""

STORAGE_FULL = "storage_full"
"""The code of a failure by a full disk: the local copy of a prefix could not be written."""

PREFIX_NOT_FOUND = "prefix_not_found"
"""The code of a failure of a prefix that was deleted since its request was admitted."""

PREFIX_REFUSED = "prefix_refused"
"""The code of a failure of a stored prefix that the served base does not accept."""

CORRUPT_PREFIX = "corrupt_prefix"
"""The code of a failure of a prefix whose stored bytes are damaged: upload them again."""


class StagedPrefix(Protocol):
    """A prefix fetched, verified and validated, in host memory, ready to compile.

    The engine only counts its rows; the content is private to the source and the runner. One that
    is gated, which takes no positions of its sequences, has its first layer in ``gated_from``; of
    others that is None.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def gated_from(self) -> int | None: ...


class PrefixUnavailable(Exception):
    """A prefix failed to load. The message is for the tenant whose request needs it; ``code`` is a
    machine-readable cause, or None for one that needs no handling of its own."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class PrefixSource(Protocol):
    """Loads a prefix from the store. Blocking; called off the engine's thread."""

    def fetch(self, key: PrefixKey) -> StagedPrefix:
        """Raise PrefixUnavailable when it fails to load."""
        ...
