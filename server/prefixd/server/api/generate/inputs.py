"""Loads the virtual tokens that stand inside prompts, on threads of its own."""

import asyncio
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import structlog

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.error_responses import from_unavailable
from prefixd.server.engine.inputs import Embeddings, InputRun
from prefixd.server.engine.prefix_source import PrefixUnavailable
from prefixd.server.engine.request import PrefixKey

log = structlog.get_logger("prefixd")

LoadEmbeddings = Callable[[PrefixKey], Embeddings]
"""Loads rows of a stored soft prompt, checked as any prefix is. Blocking. Raises
PrefixUnavailable."""

MAX_ROWS = 8192
"""Rows that are kept: 64 MiB in two bytes each of a width of 4,096."""

_THREADS = 2


class InputLoader:
    """Gives admitted requests their embeddings, and keeps those that were used last.

    What is kept is found by tenant, digest and rows, as a prefix in the pool is.
    """

    def __init__(self, load: LoadEmbeddings, *, max_rows: int = MAX_ROWS) -> None:
        self._load = load
        self._max_rows = max_rows
        self._num_rows = 0
        self._kept: OrderedDict[PrefixKey, Embeddings] = OrderedDict()
        self._loading: dict[PrefixKey, Future[Embeddings]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefixd-inputs")

    async def fill(self, admitted: Admitted) -> Admitted:
        """The requests with what they need. Raises as a request does whose prefix fails to load."""
        if not any(admitted.unloaded):
            return admitted
        try:
            requests = [
                replace(request, inputs=_in_order(request.inputs, await self._load_runs(rows)))
                for request, rows in zip(admitted.requests, admitted.unloaded, strict=True)
            ]
        except PrefixUnavailable as error:
            raise from_unavailable(admitted.explained(str(error)), error.code) from error
        return replace(admitted, requests=tuple(requests), unloaded=())

    def close(self) -> None:
        """End the threads, without waiting for a load that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _load_runs(self, rows: Iterable[tuple[int, PrefixKey]]) -> list[InputRun]:
        return [InputRun(place, await self._get(key)) for place, key in rows]

    async def _get(self, key: PrefixKey) -> Embeddings:
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
            loading = self._loading.get(key)
            if loading is None:
                loading = self._loading[key] = self._threads.submit(self._run, key)
        # Shielded: other requests may wait for the same load.
        return await asyncio.shield(asyncio.wrap_future(loading))

    def _run(self, key: PrefixKey) -> Embeddings:
        try:
            embeddings = self._load(key)
        except PrefixUnavailable:
            raise
        except Exception as error:
            log.exception("virtual tokens failed to load")
            raise PrefixUnavailable("the prefix failed to load") from error
        finally:
            with self._lock:
                del self._loading[key]
        with self._lock:
            self._keep(key, embeddings)
        return embeddings

    def _keep(self, key: PrefixKey, embeddings: Embeddings) -> None:
        self._kept[key] = embeddings
        self._num_rows += embeddings.num_rows
        while self._num_rows > self._max_rows:
            _, dropped = self._kept.popitem(last=False)
            self._num_rows -= dropped.num_rows


def _in_order(*runs: Iterable[InputRun]) -> tuple[InputRun, ...]:
    return tuple(sorted(itertools.chain(*runs), key=lambda run: run.place))
