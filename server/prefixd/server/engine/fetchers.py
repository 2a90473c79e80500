"""Threads that bring prefixes from the store, off the hot path."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import PrefixSource, PrefixUnavailable, StagedPrefix

log = logging.getLogger(__name__)

Ended = Callable[[PrefixKey, StagedPrefix | PrefixUnavailable], None]
"""Called on a fetch thread with the prefix, or with why it failed to load."""


class Fetchers:
    """A few threads over a PrefixSource."""

    def __init__(self, source: PrefixSource, *, num_threads: int) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prefix-fetch")

    def fetch(self, key: PrefixKey, ended: Ended) -> None:
        """Begin to bring a prefix; ``ended`` hears what came of it."""
        self._threads.submit(self._fetch, key, ended)

    def stop(self) -> None:
        """End, after the fetches that are under way."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, key: PrefixKey, ended: Ended) -> None:
        try:
            ended(key, self._source.fetch(key))
        except PrefixUnavailable as error:
            ended(key, error)
        except Exception:
            log.exception("prefix %s could not be loaded", key.digest)
            ended(key, PrefixUnavailable("the prefix could not be loaded"))
