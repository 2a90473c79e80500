"""One rank: join the others, then load and check the model together with them."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoder_check import DecoderRefused, check_decoder
from prefixd.server.model.decoders import DecoderUnavailable
from prefixd.server.model.load import LoadedBase, load_base
from prefixd.server.model.memory import return_free_memory
from prefixd.server.model.parallel.decoder import ParallelDecoder, local_base
from prefixd.server.model.parallel.plan import Job
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import Limits, self_check
from prefixd.server.model.thread_control import ThreadControl

_HOST = "127.0.0.1"
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Of one collective call: ranks may read their weights at different speeds."""

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, slots=True)
class RankModel:
    """What a rank runs. ``base`` has the shape of the whole model."""

    base: LoadedBase
    decoder: Decoder
    runner: Runner
    limits: Limits


def open_store(ranks: int) -> Any:
    """The store where the ranks meet, on a free port of this machine."""
    return _tcp_store(0, ranks, is_master=True, wait_for_workers=False)


def _tcp_store(port: int, ranks: int, **options: Any) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]  # defined in C++
        _HOST, port, ranks, timeout=_COLLECTIVE_TIMEOUT, **options
    )


def join(job: Job, rank: int, *, store: Any = None) -> None:
    """Become a rank of the process group, once all others do. ``store`` is the one of rank 0."""
    loopback = next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None)
    if loopback is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
    if job.device.startswith("cuda"):
        torch.cuda.set_device(rank)
    if store is None:
        store = _tcp_store(job.port, job.ranks)
    dist.init_process_group(
        _BACKENDS[torch.device(job.device).type],
        store=store,
        rank=rank,
        world_size=job.ranks,
        timeout=_COLLECTIVE_TIMEOUT,
    )


def load_rank(job: Job) -> RankModel:
    """Load this rank's part of the model and check the model, in lock step with the other ranks.

    Raises UnsupportedModel, DecoderUnavailable.
    """
    base = load_base(
        job.model,
        dtype=job.dtype,
        device=job.device,
        cache_dir=job.cache_dir,
        pool_tokens=job.pool_tokens,
        ranks=job.ranks,
    )
    checked = self_check(
        local_base(base), block_size=job.block_size, prefill_chunk=job.prefill_chunk
    )
    decoder = ParallelDecoder(base, num_blocks=job.num_blocks, block_size=job.block_size)
    try:
        check_decoder(decoder, checked.evidence, num_blocks=job.num_blocks)
    except DecoderRefused as reason:
        raise DecoderUnavailable(f"tensor_parallel is {job.ranks}, but {reason}") from reason
    return_free_memory()
    # Other processes that compute are the other ranks: no governor makes room for them.
    threads = ThreadControl(job.threads, governed=False)
    return RankModel(base, decoder, Runner(decoder, threads=threads), _largest(checked.limits))


def _largest(limits: Limits) -> Limits:
    """The limits of the whole model: each rank saw its own heads and embeddings."""
    values = torch.tensor([limits.max_abs_embedding, limits.max_abs_kv], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return Limits(*values.tolist())
