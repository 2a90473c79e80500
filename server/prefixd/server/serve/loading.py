"""Load and check the model, and choose what computes it."""

from dataclasses import dataclass
from typing import Any

import structlog
import torch

from prefixd.server.api.served import DecoderInfo
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.model.buffers import StepSizes
from prefixd.server.model.cores import default_threads
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoders import DecoderUnavailable, choose_decoder, make_pair_decoder
from prefixd.server.model.device_runner import DeviceRunner
from prefixd.server.model.int8_decoder import make_int8_decoder, require_native
from prefixd.server.model.load import LoadedBase, find_model, load_base, resolve_device
from prefixd.server.model.original import check_original, read_original
from prefixd.server.model.paged import PagedDecoder
from prefixd.server.model.paged_module import PagedModuleDecoder
from prefixd.server.model.pair_check import check_pair
from prefixd.server.model.parallel.followers import Followers
from prefixd.server.model.parallel.plan import Job, refuse_setup
from prefixd.server.model.parallel.runner import ParallelRunner
from prefixd.server.model.quantized import refuse_rounded
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import Limits, self_check
from prefixd.server.model.thread_control import ThreadControl
from prefixd.server.serve.settings import Settings
from prefixd.server.serve.shutdown import exit_process

log = structlog.get_logger("prefixd")

_CHECKED_CHUNK = 256
"""Tokens of a chunk when the model is checked; the chunks of requests vary."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can be served, and what runs it; a sequence has ``state_blocks`` for its state.
    ``followers`` are the other processes of tensor parallel."""

    base: LoadedBase
    runner: Runner | DeviceRunner | ParallelRunner
    limits: Limits
    decoder: DecoderInfo
    state_blocks: int = 0
    followers: Followers | None = None


def load_model(settings: Settings, config: SchedulerConfig, *, device: str, threads: int) -> Loaded:
    """Load and check the model, and allocate the KV pool. Raises UnsupportedModel,
    DecoderUnavailable, ParallelRefused."""
    cache_dir, original = settings.root / "models", None
    if settings.fingerprint_of is not None:  # before weights are read
        check_original(settings.fingerprint_of, settings.model, cache_dir=cache_dir)
    if settings.tensor_parallel > 1:
        return _load_on_ranks(settings, config, device=device, threads=threads)

    if settings.fingerprint_of is not None:
        original = read_original(settings.fingerprint_of, cache_dir=cache_dir)

    def load() -> LoadedBase:
        base = load_base(
            settings.model,
            dtype=settings.dtype,
            device=device,
            cache_dir=cache_dir,
            pool_tokens=pool_tokens(config),
        )
        return base if original is None else original.bind(base)

    pool: dict[str, Any] = {
        "num_blocks": config.num_blocks,
        "block_size": config.block_size,
        "data_folder": settings.root,
        "threads": threads,
    }
    if settings.quantize == "int8":  # before the seconds that loading takes
        require_native(settings.cpu_kernels, torch.device(device))
        refuse_rounded(find_model(settings.model, cache_dir=cache_dir)[2])
    base = load()
    if base.pair is not None:
        return _load_pair(settings, config, base, threads=threads)
    checked = self_check(
        base,
        block_size=config.block_size,
        prefill_chunk=min(config.max_prefill_chunk, _CHECKED_CHUNK),
    )
    decoder: Decoder
    figures: dict[str, Any] = {}
    if settings.quantize == "int8":
        decoder, quality = make_int8_decoder(base, settings.cpu_kernels, **pool)
        figures = {
            "perplexity_ratio": round(quality.ratio, 4),
            "top1_agreement": round(quality.agreement, 4),
        }
    else:
        decoder = choose_decoder(
            load,
            base,
            settings.cpu_kernels,
            evidence=checked.evidence,
            **pool,
            sizes=StepSizes(
                rows=config.max_running + config.max_staged,
                tokens=config.max_tokens_per_step,
                decoding=config.max_running,
            ),
        )
    on_cpu = base.device.type == "cpu"
    governed = settings.threads is None and on_cpu and decoder.thread_use() is None
    runner: Runner | DeviceRunner
    if isinstance(decoder, PagedDecoder | PagedModuleDecoder):
        runner = DeviceRunner(decoder, max_rows=config.max_running)
    else:
        runner = Runner(decoder, threads=ThreadControl(threads, governed=governed))
    return Loaded(
        base,
        runner,
        checked.limits,
        DecoderInfo(
            decoder.name,
            str(base.device),
            settings.dtype,
            settings.quantize,
            weights=base.scheme,
            **figures,
        ),
        state_blocks=decoder.state_blocks,
    )


def _load_pair(
    settings: Settings, config: SchedulerConfig, base: LoadedBase, *, threads: int
) -> Loaded:
    """Check an encoder-decoder, and allocate the KV pool."""
    if settings.quantize != "none":
        raise DecoderUnavailable(
            f"quantize is {settings.quantize}, but {base.name} is an encoder-decoder; expected none"
        )
    limits = check_pair(base, block_size=config.block_size)
    decoder = make_pair_decoder(
        base, settings.cpu_kernels, num_blocks=config.num_blocks, block_size=config.block_size
    )
    log.info("an encoder-decoder serves: KV is not reused, and no tokens are proposed")
    governed = settings.threads is None and base.device.type == "cpu"
    info = DecoderInfo(decoder.name, str(base.device), settings.dtype)
    return Loaded(
        base,
        Runner(decoder, threads=ThreadControl(threads, governed=governed)),
        limits,
        info,
    )


def _load_on_ranks(
    settings: Settings, config: SchedulerConfig, *, device: str, threads: int
) -> Loaded:
    """Start the processes of tensor parallel and load the model on all of them."""
    check_ranks(settings, device=device)
    find_model(
        settings.model, cache_dir=settings.root / "models", ranks=settings.tensor_parallel
    )  # a model that cannot be shared is refused before processes start
    job = _job(settings, config, device=device, threads=threads)
    followers = Followers(job, hung_s=settings.watchdog, on_lost=lambda _reason: exit_process(1))
    model = followers.load()
    info = DecoderInfo(
        model.runner.decoder.name,
        str(model.base.device),
        settings.dtype,
        settings.quantize,
        tensor_parallel=settings.tensor_parallel,
    )
    runner = ParallelRunner(model.runner, followers)
    return Loaded(model.base, runner, model.limits, info, followers=followers)


def _job(settings: Settings, config: SchedulerConfig, *, device: str, threads: int) -> Job:
    """What each rank loads. On a CPU the ranks share the threads."""
    ranks = settings.tensor_parallel
    return Job(
        model=settings.model,
        dtype=settings.dtype,
        device=device,
        cache_dir=settings.root / "models",
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        prefill_chunk=min(config.max_prefill_chunk, _CHECKED_CHUNK),
        threads=max(1, threads // ranks) if device == "cpu" else threads,
        ranks=ranks,
    )


def check_ranks(settings: Settings, *, device: str) -> None:
    """Raise ParallelRefused where the settings and this machine do not allow as many processes as
    they ask for."""
    if settings.tensor_parallel > 1:
        refuse_setup(
            settings.tensor_parallel,
            device=torch.device(device),
            kernels=settings.cpu_kernels,
            quantize=settings.quantize,
        )


def device_of(settings: Settings) -> str:
    """The device that the settings select on this machine. Raises ValueError if it is missing."""
    device = resolve_device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    return str(device)


def threads_of(settings: Settings) -> int:
    """The most threads that compute at a time."""
    return settings.threads or default_threads()


def kv_namespace(fingerprint: str, settings: Settings) -> str:
    """What computed KV depends on: the weights that compute, the dtype and int8."""
    scheme = "" if settings.quantize == "none" else f":{settings.quantize}"
    return f"{fingerprint}:{settings.dtype}{scheme}"


def pool_tokens(config: SchedulerConfig) -> int:
    """Positions that the KV pool holds."""
    return config.num_usable_blocks * config.block_size
