"""Settling the limits of ended requests, again in the background while the catalog is unavailable.

A request waits for its settlement, so that its place is free when its client reads the response,
but only for a moment: the response does not depend on it.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import structlog
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.catalog_health import CatalogHealth

log = structlog.get_logger("prefixd")

RETRY_FOR_S = 60.0
"""How long a settlement is tried again, in seconds. The leases of its request expire then."""

MAX_PENDING = 10_000

_WAIT_S = 1.0
_RETRY_EVERY_S = 0.5
_THREADS = 4

Settle = Callable[[bool], None]
"""Settles one request. Its argument: whether an earlier attempt may have been committed."""


class Settlements:
    """Settles requests in threads of its own; at most ``max_pending`` at a time.

    ``pending`` and ``dropped`` are for the metrics.
    """

    def __init__(
        self,
        health: CatalogHealth,
        *,
        retry_for_s: float = RETRY_FOR_S,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._health = health
        self._retry_for_s = retry_for_s
        self._max_pending = max_pending
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefixd-settle")
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._idle = threading.Condition(self._lock)
        self.pending = 0
        self.dropped = 0

    async def settle(self, settle: Settle) -> None:
        """Call ``settle`` until it succeeds, and wait for that up to a second."""
        settled = asyncio.Event()
        loop = asyncio.get_running_loop()

        def done() -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(settled.set)

        self.add(settle, done=done)
        if not self._health.writes_refused:
            with suppress(TimeoutError):
                await asyncio.wait_for(settled.wait(), _WAIT_S)

    def add(
        self, settle: Settle, *, done: Callable[[], None] = lambda: None, unsure: bool = False
    ) -> None:
        """Call ``settle`` until it succeeds, in the background. ``unsure``: it is not the first
        attempt. Safe in any thread."""
        with self._lock:
            full = self._closing.is_set() or self.pending >= self._max_pending
            if not full:
                self.pending += 1
        if full:
            self._drop("too many wait")
            return
        self._threads.submit(self._run, settle, done, time.monotonic(), unsure)

    def close(self, *, timeout_s: float) -> None:
        """Try those that wait again, for up to ``timeout_s`` seconds in all. Blocking."""
        self._closing.set()
        self._threads.shutdown(wait=False)
        self.wait_until_idle(timeout_s=timeout_s)

    def wait_until_idle(self, *, timeout_s: float) -> None:
        """Wait until none is pending, up to ``timeout_s`` seconds. Blocking."""
        with self._lock:
            self._idle.wait_for(lambda: not self.pending, timeout_s)

    def _run(self, settle: Settle, done: Callable[[], None], since: float, unsure: bool) -> None:
        try:
            self._retry(settle, since, unsure=unsure)
        except Exception:
            log.exception("a request's limits were not settled")
        finally:
            with self._lock:
                self.pending -= 1
                self._idle.notify_all()
            done()

    def _retry(self, settle: Settle, since: float, *, unsure: bool) -> None:
        while True:
            if not self._health.writes_refused:
                try:
                    settle(unsure)
                except SQLAlchemyError:
                    unsure = True
                else:
                    return
            if self._closing.is_set() or time.monotonic() - since > self._retry_for_s:
                self._drop("the catalog is unavailable")
                return
            self._closing.wait(_RETRY_EVERY_S)

    def _drop(self, why: str) -> None:
        with self._lock:
            self.dropped += 1
            first = self.dropped == 1
        if first:
            log.warning("the limits of ended requests were not settled", why=why)
