"""From the store to host memory: fetch, verify, judge again, cast."""

from collections.abc import Callable
from typing import Any

from prefixd.server.engine.request import PrefixKey
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.prefix import Staged, stage
from prefixd.store.artifact.artifact import Artifact


class StoreSource:
    """A PrefixSource over the prefix store. ``fetch`` runs on the engine's fetch threads."""

    def __init__(
        self, *, open_artifact: Callable[[PrefixKey], Artifact], base: LoadedBase, tokenizer: Any
    ) -> None:
        """``open_artifact`` reads and judges a stored artifact; it raises PrefixUnavailable with a
        message for the tenant when it cannot."""
        self._open_artifact = open_artifact
        self._base = base
        self._tokenizer = tokenizer

    def fetch(self, key: PrefixKey) -> Staged:
        """Bring one prefix into host memory, in the serving dtype."""
        return stage(self._open_artifact(key), self._base, self._tokenizer)
