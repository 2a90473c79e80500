"""The HTTP application, over parts made by the composition root or by tests."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import Depends, FastAPI

from prefixd.server import version
from prefixd.server.api import error_responses, health, openapi
from prefixd.server.api.admin import routes as admin_routes
from prefixd.server.api.anthropic import routes as anthropic_routes
from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.batches import routes as batch_routes
from prefixd.server.api.batches.assembly import Assembly
from prefixd.server.api.batches.line_runner import BatchParts
from prefixd.server.api.batches.worker import BatchWorker
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.dependencies import (
    BodyLimits,
    authenticated,
    within_bounds,
    within_calls,
    within_rate,
)
from prefixd.server.api.disk_metrics import BucketCollector
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.files import routes as file_routes
from prefixd.server.api.generate import routes as generate_routes
from prefixd.server.api.generate.admission import Admission
from prefixd.server.api.generate.charging import Charging
from prefixd.server.api.generate.constraints import ConstraintLoader
from prefixd.server.api.generate.embeds import EmbedsReader, GiveEmbeddings
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.generate.members import MemberResolver, StackCounts
from prefixd.server.api.generate.recipes import PromptBuilder
from prefixd.server.api.generate.resolver import PrefixResolver
from prefixd.server.api.generate.service import GenerationService
from prefixd.server.api.generate.system_texts import SystemTexts
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.middleware import RequestLayer
from prefixd.server.api.prefixes import aliases as alias_routes
from prefixd.server.api.prefixes import content as content_routes
from prefixd.server.api.prefixes import metadata as metadata_routes
from prefixd.server.api.prefixes import models as model_routes
from prefixd.server.api.prefixes import residency as residency_routes
from prefixd.server.api.prefixes import routes as prefix_routes
from prefixd.server.api.prefixes import uploads as upload_routes
from prefixd.server.api.query import check_url
from prefixd.server.api.rendering.renderer import TemplateRenderer
from prefixd.server.api.request_record import Tracer
from prefixd.server.api.responses import routes as responses_routes
from prefixd.server.api.routing import Unrouted
from prefixd.server.api.scoring import routes as scoring_routes
from prefixd.server.api.scoring import tokens as token_routes
from prefixd.server.api.served import ServedModel
from prefixd.server.api.tenant_bounds import TenantBounds
from prefixd.server.api.unsupported import router as unsupported_router
from prefixd.server.api.users import routes as user_routes
from prefixd.server.engine.engine import Engine
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.batches import Batches
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.pin_room import PinRoom
from prefixd.server.tenants.registry import Tenants
from prefixd.store.disk import DiskGuard
from prefixd.store.store import PrefixStore

ANTHROPIC = (anthropic_routes.router, anthropic_routes.count_router)
"""Their errors have Anthropic's shape."""

PUBLIC = (health.router,)
METERED = (
    generate_routes.router,
    responses_routes.router,
    anthropic_routes.router,
    scoring_routes.router,
    upload_routes.router,
    file_routes.upload_router,
)
"""Counted by the limiter, in the catalog; the others by each server for itself."""

KEYED = (
    *METERED,
    token_routes.router,
    anthropic_routes.count_router,
    unsupported_router,
    model_routes.router,
    prefix_routes.router,
    alias_routes.router,
    content_routes.router,
    metadata_routes.router,
    residency_routes.router,
    user_routes.router,
    file_routes.router,
    batch_routes.router,
    admin_routes.router,
)


def create_app(
    *,
    store: PrefixStore,
    tenants: Tenants,
    bindings: Bindings,
    limiter: Limiter,
    audit: AuditLog,
    idempotency: Idempotency,
    engine: Engine,
    served: ServedModel,
    metrics: Metrics,
    drain_state: DrainState,
    pin_room: PinRoom,
    body_limits: BodyLimits,
    disk: DiskGuard,
    catalog: CatalogAccess,
    inputs: InputLoader,
    constraints: ConstraintLoader,
    give_embeddings: GiveEmbeddings,
    batches: Batches,
    batch_options: BatchOptions,
    bounds: TenantBounds | None = None,
    body_timeout: float,
    min_body_rate: int,
    max_choices: int,
    max_request_seconds: float | None = None,
    user_header: str | None = None,
    kv_reuse: bool = True,
    trace: Tracer | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The application. ``lifespan`` starts and stops the engine and the background services. Times
    in seconds, ``min_body_rate`` in bytes per second."""
    app = FastAPI(
        title="prefixd",
        version=version(),
        description="One frozen base model, many swappable prefixes. OpenAI-compatible.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        swagger_ui_oauth2_redirect_url=None,
        # FastAPI's own traces hold paths, and with them users and prefixes.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    templates = TemplateRenderer(count=metrics.template_rendered)
    generation = GenerationService(
        admission=Admission(
            served=served,
            resolver=PrefixResolver(
                served,
                store,
                bindings,
                MemberResolver(served, store, StackCounts(served, store)),
            ),
            config=engine.config,
            max_choices=max_choices,
            prompts=PromptBuilder(served, templates, SystemTexts(served, store)),
            embeds=EmbedsReader(served, give_embeddings),
            kv_reuse=kv_reuse,
            max_seconds=max_request_seconds,
        ),
        engine=engine,
        charging=Charging(limiter=limiter, catalog=catalog, disk=disk),
        drain_state=drain_state,
        served=served,
        metrics=metrics,
        inputs=inputs,
        constraints=constraints,
        trace=trace,
        user_header=user_header,
    )
    metrics.registry.register(BucketCollector(lambda: store.num_blob_failures))
    app.state.audit = audit
    app.state.batch_options = batch_options
    app.state.batches = batches
    app.state.batch_worker = BatchWorker(
        BatchParts(
            app=app,
            batches=batches,
            tenants=tenants,
            catalog=catalog,
            metrics=metrics,
            assembly=Assembly(
                batches=batches,
                store=store,
                folder=body_limits.upload_dir,
                max_bytes=body_limits.max_body_bytes,
                files_kept=batch_options.files_kept,
            ),
        ),
        drain_state,
        max_lines=batch_options.max_lines,
    )
    app.state.bindings = bindings
    app.state.body_limits = body_limits
    app.state.bounds = bounds or TenantBounds()
    app.state.catalog = catalog
    app.state.disk = disk
    app.state.drain_state = drain_state
    app.state.engine = engine
    app.state.generation = generation
    app.state.idempotency = idempotency
    app.state.limiter = limiter
    app.state.metrics = metrics
    app.state.pin_room = pin_room
    app.state.served = served
    app.state.store = store
    app.state.templates = templates
    app.state.tenants = tenants
    for router in PUBLIC:
        app.include_router(router, responses=openapi.NO_METHOD)
    # Deny by default: every route outside PUBLIC requires a key, before its body is read.
    for router in KEYED:
        bounds_of = [Depends(within_bounds)]
        if router not in METERED:
            bounds_of = [Depends(within_rate), Depends(within_calls, scope="function")]
        app.include_router(
            router,
            dependencies=[Depends(authenticated), *bounds_of, Depends(check_url)],
            responses=openapi.ANTHROPIC_ERRORS if router in ANTHROPIC else openapi.ERRORS,
        )
    routers = (*PUBLIC, *KEYED)
    app.router.routes.append(
        Unrouted([*app.routes, *(route for router in routers for route in router.routes)])
    )
    error_responses.install(app)
    openapi.install(app)
    app.add_middleware(
        RequestLayer,
        metrics=metrics,
        drain_state=drain_state,
        body_timeout=body_timeout,
        min_body_rate=min_body_rate,
    )
    return app
