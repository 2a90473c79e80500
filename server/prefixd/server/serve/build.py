"""The composition root: from settings to catalog, model, engine and application.

The only module that imports both the model and the API, and with them torch: it is imported when a
server starts and not before.
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import structlog
import torch
from fastapi import FastAPI

from prefixd.server.api.app import create_app
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_metrics import CatalogCollector
from prefixd.server.api.dependencies import BodyLimits
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.prefixes.residency import pin_room
from prefixd.server.api.served import DecoderInfo, EncoderInfo, ServedModel
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.runner import ModelRunner
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.cores import default_threads
from prefixd.server.model.decoders import DecoderUnavailable
from prefixd.server.model.demo import DemoModelMissing
from prefixd.server.model.gated_places import attention_name, refuse_gated
from prefixd.server.model.load import (
    LoadedBase,
    check_folder,
    is_folder,
    resolve_device,
)
from prefixd.server.model.original import check_original
from prefixd.server.model.parallel.followers import Followers, RankLost
from prefixd.server.model.parallel.outcome import RankFailed
from prefixd.server.model.parallel.plan import ParallelRefused
from prefixd.server.model.prefix import StorePrefixSource, refused_kinds
from prefixd.server.model.selfcheck import Limits
from prefixd.server.model.threads import compute, limit_thread
from prefixd.server.model.tokenizer import Tokenizer
from prefixd.server.serve.artifacts import Artifacts
from prefixd.server.serve.bounds import tenant_bounds
from prefixd.server.serve.catalog import CatalogParts, open_catalog, upload_dir
from prefixd.server.serve.lifespan import make_lifespan
from prefixd.server.serve.loading import kv_namespace, load_model, pool_tokens
from prefixd.server.serve.settings import Settings
from prefixd.server.serve.telemetry import open_tracer
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.retention import Expired, remove_expired
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.kinds import Kind
from prefixd.store.files import UPLOAD_PREFIX, remove_interrupted
from prefixd.store.gc import GcResult, Sweeper
from prefixd.store.names import BlobKey

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

_QUEUED_POOLS = 8
"""How many times the pool's size may wait, unless the operator says otherwise."""


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
    if loaded.state_blocks:
        config = with_states(config, base, state_blocks=loaded.state_blocks)
    if base.pair is not None:
        config = replace(config, speculate=False)
    served = _served_model(settings, config, base, loaded.limits, decoder)
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
        drain_state=drain_state,
        pin_room=room,
        body_limits=BodyLimits(
            upload_dir=prepare_upload_folder(settings.root),
            max_body_bytes=settings.max_body_bytes,
            max_prefix_bytes=settings.max_prefix_bytes,
            max_import_bytes=settings.max_import_bytes,
        ),
        bounds=tenant_bounds(settings),
        body_timeout=settings.body_timeout,
        min_body_rate=settings.min_body_rate,
        max_choices=settings.max_choices,
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
            sweeper=_make_sweeper(settings, catalog, engine),
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


def prepare_upload_folder(root: Path) -> Path:
    """Create the folder for uploads in flight and remove interrupted uploads from it. Another
    server may share the folder: its uploads are locked, and stay."""
    folder = upload_dir(root)
    folder.mkdir(parents=True, exist_ok=True)
    remove_interrupted(folder, prefix=UPLOAD_PREFIX)
    return folder


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


def _make_sweeper(settings: Settings, catalog: CatalogParts, engine: Engine) -> Sweeper:
    """Removes expired rows, interrupted uploads and deleted prefixes in the background, except
    those that the engine holds."""
    grace, days = timedelta(seconds=settings.gc_grace), settings.audit_days
    audit_kept = None if days is None else timedelta(days=days)

    def sweep() -> GcResult:
        expired = remove_expired(catalog.database, audit_kept=audit_kept)
        if expired != Expired():
            log.info("removed expired rows", **asdict(expired))
        resident = [BlobKey(key.tenant, key.digest) for key in engine.held_prefixes()]
        return catalog.store.collect(grace=grace, resident=resident)

    def tidy() -> None:
        catalog.store.remove_interrupted()
        remove_interrupted(upload_dir(settings.root), prefix=UPLOAD_PREFIX)

    return Sweeper(sweep, interval_s=settings.gc_interval, tidy=tidy)


def device_of(settings: Settings) -> str:
    """The device that the settings select on this machine. Raises ValueError if it is missing."""
    device = resolve_device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    return str(device)


def threads_of(settings: Settings) -> int:
    """The most threads that compute at a time."""
    return settings.threads or default_threads()


def model_origin(settings: Settings) -> str:
    """Where the model is loaded from. Raises FileNotFoundError for a folder that does not exist and
    UnsupportedModel for one whose config or tokenizer cannot be served, or whose original is not
    the one that the settings name."""
    text = f"{settings.model} would be looked up on Hugging Face"
    if is_folder(settings.model):
        scheme = check_folder(
            settings.model,
            pool_tokens=pool_tokens(scheduler_config(settings)),
            device=device_of(settings),
            ranks=settings.tensor_parallel,
            rounded=settings.quantize == "int8",
        )
        text = f"local folder {settings.model}: config and tokenizer can be served"
        if scheme is not None:
            text += f", quantized with {scheme}"
    elif settings.fingerprint_of is not None and settings.model != "demo":
        return f"{text}, and compared with {settings.fingerprint_of} at start"
    if settings.fingerprint_of is not None:
        check_original(settings.fingerprint_of, settings.model, cache_dir=settings.root / "models")
        text += f", for prefixes of {settings.fingerprint_of}"
    return text


def with_states(config: SchedulerConfig, base: LoadedBase, *, state_blocks: int) -> SchedulerConfig:
    """The slice of a model whose layers keep states, which take ``state_blocks`` of each sequence
    and prefix. Says in the log what that costs and turns off.

    Raises UnsupportedModel for a pool without room for a sequence under a prefix.
    """
    config = replace(config, state_blocks=state_blocks)
    kind, positions = base.layers.states[0].kind, state_blocks * config.block_size
    if config.max_tokens_for(1) < 1:
        raise UnsupportedModel(
            f"{base.name} keeps a state in its layers of {kind}, which takes {state_blocks} blocks "
            f"of each sequence and prefix; expected kv_tokens of at least "
            f"{2 * (positions + config.block_size)}, received "
            f"{config.num_usable_blocks * config.block_size}"
        )
    log.info(
        "layers keep a state: it takes blocks of each sequence and prefix, no KV is reused between "
        "requests, and no tokens are proposed",
        layers=kind,
        state_blocks=state_blocks,
        as_much_as_tokens=positions,
    )
    return config


def scheduler_config(settings: Settings) -> SchedulerConfig:
    """The engine's slice of the settings."""
    return SchedulerConfig(
        num_blocks=-(-settings.kv_tokens // settings.block_size) + 1,  # and the null block
        block_size=settings.block_size,
        max_tokens_per_step=settings.max_tokens_per_step,
        max_prefill_chunk=settings.max_prefill_chunk,
        max_token_gap_s=settings.max_token_gap or None,
        max_running=settings.max_running,
        max_resident_tokens=settings.max_resident_tokens,
        host_tokens=settings.host_kv_tokens,
        max_prefix_wait_s=settings.max_prefix_wait,
        max_waiting_tokens=settings.max_waiting_tokens or _QUEUED_POOLS * settings.kv_tokens,
        max_queue_wait_s=settings.max_queue_wait or None,
        speculate=settings.speculate == "ngram",
    )


def _served_model(
    settings: Settings,
    config: SchedulerConfig,
    base: LoadedBase,
    limits: Limits,
    decoder: DecoderInfo,
) -> ServedModel:
    name = settings.served_model_name or base.name
    pair = base.pair
    return ServedModel(
        name=name,
        base=BaseSpec(
            name=name,
            fingerprint=base.fingerprint,
            num_layers=base.shape.num_layers,
            num_kv_heads=base.shape.num_kv_heads,
            head_dim=base.shape.head_dim,
            embedding_width=base.shape.embedding_width,
            max_virtual_tokens=min(settings.max_virtual_tokens, base.shape.max_positions - 1),
            dtype=settings.dtype,
            max_abs_embedding=limits.max_abs_embedding,
            max_abs_kv=limits.max_abs_kv,
            refused_kinds=_refused_kinds(settings, base),
            attention_module=attention_name(base.module),
            encoder_layers=None if pair is None else pair.encoder_layers,
        ),
        decoder=decoder,
        max_positions=base.shape.max_positions,
        vocab_size=base.num_embeddings,
        logits_size=base.num_logits,
        eos_token_ids=frozenset(i for i in base.eos_token_ids if 0 <= i < base.num_logits),
        created=int(time.time()),
        tokenizer=Tokenizer(base.tokenizer),
        prefix_warnings=base.layers.sight_warnings,
        encoder=None
        if pair is None
        else EncoderInfo(
            start=pair.start,
            max_tokens=min(config.max_tokens_per_step, pair.max_source or sys.maxsize),
            block_size=config.block_size,
        ),
    )


def _refused_kinds(settings: Settings, base: LoadedBase) -> dict[Kind, str]:
    """Kinds of prefixes that the base cannot take, with the reason."""
    if base.pair is not None:
        return refused_kinds(base)
    refused, reason = refused_kinds(base), refuse_gated(base.module, base.shape)
    if settings.tensor_parallel > 1:
        reason = "tensor parallel does not compile adaption prompts"
    if reason is None:
        return refused
    others = "a soft prompt or a text"
    if Kind.KV_PREFIX not in refused:
        others = "a soft prompt, a KV prefix or a text"
    return refused | {Kind.ADAPTION_PROMPT: f"expected {others}, since {reason}"}
