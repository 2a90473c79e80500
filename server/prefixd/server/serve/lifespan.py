"""Background services, started before the first request and stopped after the last."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import structlog
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.request_record import Tracer
from prefixd.server.engine.engine import Engine
from prefixd.server.serve.pin_sync import PinSync
from prefixd.server.tenants.limiter import RENEW_EVERY_S, Limiter
from prefixd.server.tenants.pin_room import PinRoom
from prefixd.server.tenants.registry import Tenants
from prefixd.store.disk import DiskGuard, DiskWatch
from prefixd.store.gc import Sweeper
from prefixd.store.store import PrefixStore

log = structlog.get_logger("prefixd")


def make_lifespan(
    *,
    engine: Engine,
    store: PrefixStore,
    tenants: Tenants,
    limiter: Limiter,
    disk: DiskGuard,
    fingerprint: str,
    pin_room: PinRoom,
    sweeper: Sweeper | None = None,
    trace: Tracer | None = None,
    database: Database | None = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """A lifespan that runs the engine, pin sync, lease renewal, the watch over the disk and
    ``sweeper``, and at the end
    closes ``trace`` and ``database``. ``fingerprint`` is the served base's."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        pin_sync = PinSync(
            store,
            engine,
            fingerprint=fingerprint,
            room=pin_room,
            resident_keys=lambda: engine.stats().prefixes_held,
            resident_caps=tenants.resident_caps,
        )
        pin_sync.start()
        disk_watch = DiskWatch(disk)
        disk_watch.start()
        renewing = asyncio.create_task(_renew_leases(limiter))
        if sweeper is not None:
            sweeper.start()
        try:
            yield
        finally:
            renewing.cancel()
            if sweeper is not None:
                sweeper.stop()
            pin_sync.stop()
            disk_watch.stop()
            engine.stop()
            if trace is not None:
                trace.close()
            if database is not None:
                # The last connection to close leaves SQLite's catalog in one file.
                database.dispose()

    return lifespan


async def _renew_leases(limiter: Limiter) -> None:
    """Keep the leases of running requests valid while this process lives."""
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        try:
            await run_in_threadpool(limiter.renew)
        except SQLAlchemyError:
            log.exception("the leases of running requests were not renewed")
