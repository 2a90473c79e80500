"""The composition root without the model: parts to an application, settings to a catalog.

``create_app`` takes parts that are ready, so tests hand it fakes and import no torch. The real
model's parts are made in ``prefixd.server.serve.build``.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog
from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api import error_responses as refusals
from prefixd.server.api import openapi
from prefixd.server.api import public as routes_public
from prefixd.server.api.admin import routes as routes_admin
from prefixd.server.api.admin import state as routes_state
from prefixd.server.api.auth import authenticated
from prefixd.server.api.generate import routes as routes_generate
from prefixd.server.api.middleware import RequestLayer
from prefixd.server.api.prefixes import models as routes_models
from prefixd.server.api.prefixes import residency_routes as routes_residency
from prefixd.server.api.prefixes import routes as routes_prefixes
from prefixd.server.api.prefixes import uploads as routes_uploads
from prefixd.server.api.prefixes.residency import pin_room
from prefixd.server.api.services import ApiLimits, Services
from prefixd.server.api.users import routes as routes_users
from prefixd.server.serve.pin_sync import PinSync
from prefixd.server.serve.settings import Settings
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import RENEW_EVERY_S, Limiter
from prefixd.server.tenants.registry import Tenants
from prefixd.store.blobs.blobs import open_blobs
from prefixd.store.db.database import create_tables, open_database
from prefixd.store.gc import Sweeper
from prefixd.store.store import PrefixStore

__all__ = ["ApiLimits", "CatalogServices", "Services", "api_limits", "create_app", "open_catalog"]

log = structlog.get_logger("prefixd")

_UPLOAD_LIFETIME_S = 24 * 3600

PUBLIC = (routes_public.router,)
KEYED = (
    routes_generate.router,
    routes_models.router,
    routes_prefixes.router,
    routes_uploads.router,
    routes_residency.router,
    routes_users.router,
    routes_admin.router,
    routes_state.router,
)


def create_app(services: Services, *, sweeper: Sweeper | None = None) -> FastAPI:
    """The application over ready parts. Its lifespan starts and stops engine and ``sweeper``."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        services.engine.start()
        keeper = PinSync(
            services.store,
            services.engine,
            fingerprint=services.served.base.fingerprint,
            room=pin_room(services),
            held=lambda: services.engine.stats().prefixes_held,
            caps_of=services.tenants.resident_caps,
        )
        keeper.start()
        renewing = asyncio.create_task(_keep_leases(services.limiter))
        if sweeper is not None:
            sweeper.start()
        try:
            yield
        finally:
            renewing.cancel()
            if sweeper is not None:
                sweeper.stop()
            keeper.stop()
            services.engine.stop()
            if services.trace is not None:
                services.trace.close()
            if services.database is not None:
                # The last connection to close leaves SQLite's catalog in one file.
                services.database.dispose()

    app = FastAPI(
        title="prefixd",
        version=_version(),
        description="One frozen base model, many swappable prefixes. OpenAI-compatible.",
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # What FastAPI would trace by itself holds paths, and with them users and prefixes.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.services = services
    for router in PUBLIC:
        app.include_router(router)
    # Deny by default: whatever is not in PUBLIC asks for a key, before its body is read.
    for router in KEYED:
        app.include_router(router, dependencies=[Depends(authenticated)], responses=openapi.ERRORS)
    refusals.install(app)
    openapi.install(app)
    app.add_middleware(
        RequestLayer,
        metrics=services.metrics,
        drain_state=services.drain_state,
        body_timeout=services.limits.body_timeout,
        min_body_rate=services.limits.min_body_rate,
    )
    return app


async def _keep_leases(limiter: Limiter) -> None:
    """Let the requests that run here go on counting, for as long as this process lives."""
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        try:
            await run_in_threadpool(limiter.renew)
        except SQLAlchemyError:
            log.exception("the leases of running requests were not renewed")


def _version() -> str:
    try:
        return version("prefixd")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"


@dataclass(frozen=True, slots=True)
class CatalogServices:
    """The durable half, which the command line uses without a model."""

    database: Database
    store: PrefixStore
    tenants: Tenants
    bindings: Bindings
    limiter: Limiter
    audit: AuditLog
    idempotency: Idempotency


def open_catalog(settings: Settings) -> CatalogServices:
    """Open the catalog and the blobs, and make what is missing."""
    database = open_database(settings.catalog_url)
    create_tables(database)
    return CatalogServices(
        database=database,
        store=PrefixStore(database, open_blobs(settings.blobs_url, settings.root)),
        tenants=Tenants(database),
        bindings=Bindings(database),
        limiter=Limiter(database),
        audit=AuditLog(database),
        idempotency=Idempotency(database),
    )


def api_limits(settings: Settings) -> ApiLimits:
    """The API room's slice of the settings; makes the folder for uploads."""
    return ApiLimits(
        upload_dir=_upload_folder(settings.root),
        max_body_bytes=settings.max_body_bytes,
        max_prefix_bytes=settings.max_prefix_bytes,
        max_choices=settings.max_choices,
        body_timeout=settings.body_timeout,
        min_body_rate=settings.min_body_rate,
        max_import_bytes=settings.max_import_bytes,
        max_request_seconds=settings.max_request_seconds,
        max_pinned_tokens=settings.max_pinned_tokens,
        kv_reuse=settings.kv_reuse,
    )


def _upload_folder(root: Path) -> Path:
    """Where uploads in flight go, without what killed processes left there. Another server may
    share the folder, so only what no upload can still be using is removed."""
    folder = root / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    old = time.time() - _UPLOAD_LIFETIME_S
    for leftover in folder.glob("upload-*"):
        if leftover.stat().st_mtime < old:
            leftover.unlink(missing_ok=True)
    return folder
