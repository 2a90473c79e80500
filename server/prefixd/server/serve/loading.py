"""Load and check the model, and choose what computes it."""

from dataclasses import dataclass
from typing import Any

import torch

from prefixd.server.api.served import DecoderInfo
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoders import DecoderUnavailable, choose_decoder
from prefixd.server.model.int8_decoder import describe_int8, make_int8_decoder, require_native
from prefixd.server.model.load import LoadedBase, load_base
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import Limits, self_check
from prefixd.server.model.thread_control import ThreadControl
from prefixd.server.serve.settings import Settings

_CHECKED_CHUNK = 256
"""Tokens of a chunk when the model is checked; the chunks of requests vary."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can be served, and what runs it."""

    base: LoadedBase
    runner: Runner
    limits: Limits
    decoder: DecoderInfo


def load_model(settings: Settings, config: SchedulerConfig, *, device: str, threads: int) -> Loaded:
    """Load and check the model, and allocate the KV pool. Raises UnsupportedModel,
    DecoderUnavailable."""

    def load() -> LoadedBase:
        return load_base(
            settings.model,
            dtype=settings.dtype,
            device=device,
            cache_dir=settings.root / "models",
            pool_tokens=pool_tokens(config),
        )

    pool: dict[str, Any] = {
        "num_blocks": config.num_blocks,
        "block_size": config.block_size,
        "data_folder": settings.root,
        "threads": threads,
    }
    if settings.quantize == "int8":  # before the seconds that loading takes
        require_native(settings.cpu_kernels, torch.device(device))
    base = load()
    checked = self_check(
        base,
        block_size=config.block_size,
        prefill_chunk=min(config.max_prefill_chunk, _CHECKED_CHUNK),
    )
    decoder: Decoder
    figures = {}
    if settings.quantize == "int8":
        decoder, quality = make_int8_decoder(base, settings.cpu_kernels, **pool)
        figures = {
            "perplexity_ratio": round(quality.ratio, 4),
            "top1_agreement": round(quality.agreement, 4),
        }
    else:
        decoder = choose_decoder(
            load, base, settings.cpu_kernels, evidence=checked.evidence, **pool
        )
    on_cpu = base.device.type == "cpu"
    governed = settings.threads is None and on_cpu and decoder.thread_use() is None
    return Loaded(
        base,
        Runner(decoder, threads=ThreadControl(threads, governed=governed)),
        checked.limits,
        DecoderInfo(decoder.name, str(base.device), settings.dtype, settings.quantize, **figures),
    )


def check_int8(settings: Settings, *, device: str) -> str:
    """Whether int8 can be computed here and by what. Raises DecoderUnavailable where the settings
    ask for it and it cannot, as a start does."""
    asked = settings.quantize == "int8"
    try:
        text = describe_int8(
            settings.cpu_kernels,
            getattr(torch, settings.dtype),
            torch.device(device),
            settings.root,
        )
    except DecoderUnavailable as reason:
        if asked:
            raise
        return f"off; with it, a start would fail: {reason}"
    return text if asked else f"off; with it: {text}"


def kv_namespace(fingerprint: str, settings: Settings) -> str:
    """What computed KV depends on: the base, the dtype and int8. The fingerprint is that of the
    checkpoint, for which prefixes are trained."""
    scheme = "" if settings.quantize == "none" else f":{settings.quantize}"
    return f"{fingerprint}:{settings.dtype}{scheme}"


def pool_tokens(config: SchedulerConfig) -> int:
    """Positions that the KV pool holds."""
    return config.num_usable_blocks * config.block_size
