"""The probe of the catalog, in a thread of its own: it may hang together with the catalog."""

import asyncio
import threading
from collections.abc import Callable

from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.catalog_health import CatalogHealth, ProbeState
from prefixd.store.db.database import check_readable, check_writable

INTERVAL_S = 1.0
"""Seconds between two probes."""

_REPORT_EVERY_S = 0.25


class CatalogProbe:
    """Probes ``database`` every ``interval_s`` seconds, for ``health``."""

    def __init__(
        self, database: Database, health: CatalogHealth, *, interval_s: float = INTERVAL_S
    ) -> None:
        self._database = database
        self._health = health
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixd-probe", daemon=True)

    def start(self) -> None:
        """Start the thread, which probes first."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the probe in progress, without waiting for it."""
        self._stop.set()

    def join(self, *, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` seconds for the probe in progress: a connection that it has, or
        opens, after the database was disposed of stays open."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._probe(self._health.reads, check_readable)
            self._probe(self._health.writes, check_writable)
            self._stop.wait(self._interval_s)

    def _probe(self, state: ProbeState, check: Callable[[Database], None]) -> None:
        if self._stop.is_set():
            return
        state.begin()
        try:
            check(self._database)
        except (SQLAlchemyError, OSError):
            state.fail()
        else:
            state.succeed()


async def report_health(health: CatalogHealth) -> None:
    """Log each change of the circuit breaker, until cancelled."""
    while True:
        health.report()
        await asyncio.sleep(_REPORT_EVERY_S)
