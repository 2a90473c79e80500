"""The composition root: from settings to catalog, model, engine and application.

It imports the model, and with it torch: it is imported when a server starts and not before.
"""

from dataclasses import dataclass, replace

import structlog
from fastapi import FastAPI

from prefixd.server.api.app import create_app
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_metrics import CatalogCollector
from prefixd.server.api.dependencies import BodyLimits
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.generate.constraints import ConstraintLoader
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.prefixes.residency import pin_room
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.runner import ModelRunner
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.decoders import DecoderUnavailable
from prefixd.server.model.demo import DemoModelMissing
from prefixd.server.model.grammar.compiler import LLGuidanceCompiler
from prefixd.server.model.grammar.vocabulary import vocabulary_of
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.parallel.followers import Followers, RankLost
from prefixd.server.model.parallel.outcome import RankFailed
from prefixd.server.model.parallel.plan import ParallelRefused
from prefixd.server.model.prefix import StorePrefixSource
from prefixd.server.model.threads import compute, limit_thread
from prefixd.server.model.tokenizer import Tokenizer
from prefixd.server.serve.artifacts import Artifacts
from prefixd.server.serve.bounds import batch_options, tenant_bounds
from prefixd.server.serve.catalog import open_catalog
from prefixd.server.serve.engine_config import scheduler_config, with_scores, with_states
from prefixd.server.serve.lifespan import make_lifespan
from prefixd.server.serve.loading import device_of, kv_namespace, load_model, threads_of
from prefixd.server.serve.served_model import served_model
from prefixd.server.serve.settings import Settings
from prefixd.server.serve.sweeper import make_sweeper, prepare_upload_folder
from prefixd.server.serve.telemetry import open_tracer
from prefixd.server.tenants.registry import Tenants

log = structlog.get_logger("prefixd")

MODEL_ERRORS = (
    UnsupportedModel,
    DemoModelMissing,
    DecoderUnavailable,
    ParallelRefused,
    RankFailed,
    RankLost,
)
"""Errors of a model that cannot be served; their message says why."""


@dataclass(frozen=True, slots=True)
class Server:
    """A loaded server: the application, and the parts that the process around it needs."""

    app: FastAPI
    engine: Engine
    tenants: Tenants
    served: ServedModel
    drain_state: DrainState
    metrics: Metrics
    device: str
    kernels: str
    followers: Followers | None


def build_server(settings: Settings) -> Server:
    """Open the catalog, load and check the model, and make the engine and the application.

    Raises UnsupportedModel, DemoModelMissing, or OSError for a model that cannot be found.
    """
    limit_thread()  # the engine's thread computes, and no other
    config = scheduler_config(settings)
    device = device_of(settings)
    catalog = open_catalog(settings, settings.timeouts)
    threads = threads_of(settings)
    loaded = compute(
        lambda: load_model(settings, config, device=device, threads=threads), threads=threads
    )
    base, decoder = loaded.base, loaded.decoder
    config = with_scores(config, base)
    if loaded.state_blocks:
        config = with_states(config, base, state_blocks=loaded.state_blocks)
    if base.pair is not None:
        config = replace(config, speculate=False)
    served = served_model(settings, config, base, loaded.limits, decoder)
    source = StorePrefixSource(
        open_artifact=Artifacts(catalog.store, served, catalog.disk),
        base=base,
        tokenizer=Tokenizer(base.tokenizer),
    )
    engine = _engine(settings, config, base, runner=loaded.runner, source=source)
    trace = open_tracer()
    drain_state = DrainState()
    metrics = Metrics(engine.stats, catalog.disk, decoder)
    access = CatalogAccess.make(wait_s=settings.catalog_timeout)
    metrics.registry.register(CatalogCollector(access))
    room = pin_room(config, settings.max_pinned_tokens)
    inputs = InputLoader(source.embeddings)
    constraints = ConstraintLoader(LLGuidanceCompiler(lambda: vocabulary_of(base)), metrics)
    app = create_app(
        store=catalog.store,
        tenants=catalog.tenants,
        bindings=catalog.bindings,
        limiter=catalog.limiter,
        audit=catalog.audit,
        idempotency=catalog.idempotency,
        engine=engine,
        served=served,
        metrics=metrics,
        disk=catalog.disk,
        catalog=access,
        inputs=inputs,
        constraints=constraints,
        give_embeddings=source.given,
        drain_state=drain_state,
        pin_room=room,
        body_limits=BodyLimits(
            upload_dir=prepare_upload_folder(settings.root),
            max_body_bytes=settings.max_body_bytes,
            max_prefix_bytes=settings.max_prefix_bytes,
            max_import_bytes=settings.max_import_bytes,
            max_input_bytes=settings.max_input_bytes,
        ),
        batches=catalog.batches,
        batch_options=batch_options(settings),
        bounds=tenant_bounds(settings),
        body_timeout=settings.body_timeout,
        min_body_rate=settings.min_body_rate,
        max_choices=settings.max_choices,
        user_header=settings.user_header,
        max_request_seconds=settings.max_request_seconds,
        kv_reuse=settings.kv_reuse,
        trace=trace,
        lifespan=make_lifespan(
            engine=engine,
            store=catalog.store,
            tenants=catalog.tenants,
            limiter=catalog.limiter,
            disk=catalog.disk,
            fingerprint=base.fingerprint,
            pin_room=room,
            inputs=inputs,
            constraints=constraints,
            sweeper=make_sweeper(settings, catalog, engine),
            trace=trace,
            catalog=access,
            database=catalog.database,
            followers=loaded.followers,
        ),
    )
    return Server(
        app,
        engine,
        catalog.tenants,
        served,
        drain_state,
        metrics,
        device,
        decoder.kernels,
        loaded.followers,
    )


def _engine(
    settings: Settings,
    config: SchedulerConfig,
    base: LoadedBase,
    *,
    runner: ModelRunner,
    source: StorePrefixSource,
) -> Engine:
    return Engine(
        config=config,
        runner=runner,
        source=source,
        detokenizer=Tokenizer(base.tokenizer).detokenizer,
        namespace=kv_namespace(base.weights_fingerprint, settings),
        watchdog_s=settings.watchdog,
    )
