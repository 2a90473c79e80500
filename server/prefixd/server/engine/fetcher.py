"""Fetches of prefixes from the store, on threads of their own."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from prefixd.server.engine.prefix_source import PrefixSource, PrefixUnavailable, StagedPrefix
from prefixd.server.engine.request import PrefixKey

log = logging.getLogger(__name__)

FetchResult = StagedPrefix | PrefixUnavailable


class Fetcher:
    """Fetches up to ``threads`` prefixes at a time."""

    def __init__(self, source: PrefixSource, *, threads: int) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="prefix-fetch")

    def fetch(self, key: PrefixKey, on_result: Callable[[FetchResult], None]) -> None:
        """Load a prefix; ``on_result`` is called on a fetch thread."""
        self._threads.submit(self._run, key, on_result)

    def stop(self) -> None:
        """End the threads, after the fetches in progress."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, key: PrefixKey, on_result: Callable[[FetchResult], None]) -> None:
        result: FetchResult
        try:
            result = self._source.fetch(key)
        except PrefixUnavailable as error:
            result = error
        except Exception:
            log.exception("prefix %s failed to load", key.digest)
            result = PrefixUnavailable("the prefix failed to load")
        on_result(result)
