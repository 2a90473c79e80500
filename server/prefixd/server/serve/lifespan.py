"""Background services, started before the first request and stopped after the last."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_calls import CatalogCalls
from prefixd.server.api.generate.constraints import ConstraintLoader
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.request_record import Tracer
from prefixd.server.engine.engine import Engine
from prefixd.server.errors import Unavailable
from prefixd.server.serve.catalog_probe import CatalogProbe, report_health
from prefixd.server.serve.pin_sync import PinSync
from prefixd.server.tenants.limiter import RENEW_EVERY_S, Limiter
from prefixd.server.tenants.pin_room import PinRoom
from prefixd.server.tenants.registry import Tenants
from prefixd.store.disk import DiskGuard, DiskWatch
from prefixd.store.gc import Sweeper
from prefixd.store.store import PrefixStore

if TYPE_CHECKING:  # it imports torch, which the tests of the API do without
    from prefixd.server.model.parallel.followers import Followers

CLOSING_S = 0.5
"""How long the calls on the catalog, and then its connections, may take to end, in seconds."""

_RETURN_EVERY_S = 0.5

log = structlog.get_logger("prefixd")


def make_lifespan(
    *,
    engine: Engine,
    store: PrefixStore,
    tenants: Tenants,
    limiter: Limiter,
    disk: DiskGuard,
    catalog: CatalogAccess,
    database: Database,
    fingerprint: str,
    pin_room: PinRoom,
    inputs: InputLoader,
    constraints: ConstraintLoader,
    sweeper: Sweeper | None = None,
    trace: Tracer | None = None,
    followers: "Followers | None" = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """A lifespan that runs the engine, the application's batches, pin sync, lease renewal, the
    watch over the disk and ``sweeper``, and at the end closes ``inputs``, ``constraints``, the
    application's templates, ``trace``, ``database`` and ``followers``. ``fingerprint`` is the
    served base's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        pin_sync = PinSync(
            store,
            engine,
            fingerprint=fingerprint,
            room=pin_room,
            resident_keys=engine.held_prefixes,
            resident_caps=tenants.resident_caps,
        )
        pin_sync.start()
        disk_watch = DiskWatch(disk)
        disk_watch.start()
        probe = CatalogProbe(database, catalog.health)
        probe.start()
        renewing = asyncio.create_task(_renew_leases(limiter, catalog.calls))
        returning = asyncio.create_task(_return_portions(limiter, catalog.calls))
        reporting = asyncio.create_task(report_health(catalog.health))
        batches = asyncio.create_task(app.state.batch_worker.run())
        if sweeper is not None:
            sweeper.start()
        try:
            yield
        finally:
            batches.cancel()
            await asyncio.wait({batches})  # it releases what it holds
            renewing.cancel()
            returning.cancel()
            reporting.cancel()
            probe.stop()
            if sweeper is not None:
                sweeper.stop()
            pin_sync.stop()
            disk_watch.stop()
            engine.stop()
            inputs.close()
            constraints.close()
            app.state.templates.close()
            if followers is not None:
                followers.close()
            if trace is not None:
                trace.close()
            _close_catalog(catalog, database, limiter, probe)

    return lifespan


def _close_catalog(
    catalog: CatalogAccess, database: Database, limiter: Limiter, probe: CatalogProbe
) -> None:
    """Close the catalog, which may hang: then the process ends without."""

    def close() -> None:
        catalog.close(timeout_s=CLOSING_S)
        try:
            limiter.return_portions(all_of_them=True)
        except SQLAlchemyError:
            log.warning("what was not used of the tenants' limits was not returned")
        probe.join(timeout_s=CLOSING_S)

    # The last connection to close leaves SQLite's catalog in one file.
    for last_call in (close, database.dispose):
        closing = threading.Thread(target=last_call, daemon=True)
        closing.start()
        closing.join(CLOSING_S)


async def _return_portions(limiter: Limiter, calls: CatalogCalls) -> None:
    """Charge and return what requests have used and left of the portions of limits."""
    while True:
        await asyncio.sleep(_RETURN_EVERY_S)
        if limiter.has_portions:
            # While the catalog is unavailable they are kept.
            with suppress(SQLAlchemyError, Unavailable):
                await calls.write(limiter.return_portions)


async def _renew_leases(limiter: Limiter, calls: CatalogCalls) -> None:
    """Keep the leases of running requests valid while this process lives."""
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        try:
            await calls.write(limiter.renew)
        except (SQLAlchemyError, Unavailable):
            log.warning("the leases of running requests were not renewed")
