"""What every rank is asked to do, and settings that do not allow it."""

from dataclasses import dataclass
from pathlib import Path

import torch


class ParallelRefused(Exception):
    """The settings do not allow tensor parallel here; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank loads and serves: plain values, which are sent to followers."""

    model: str
    dtype: str
    device: str
    cache_dir: Path
    num_blocks: int
    block_size: int
    prefill_chunk: int
    threads: int
    ranks: int
    port: int = 0
    """Of the store on this machine where the ranks meet."""

    @property
    def pool_tokens(self) -> int:
        """Positions that the KV pool holds."""
        return (self.num_blocks - 1) * self.block_size


def refuse_setup(ranks: int, *, device: torch.device, kernels: str, quantize: str) -> None:
    """Raise ParallelRefused for settings that do not go with ``ranks`` processes."""
    asked = f"tensor_parallel is {ranks}"
    if quantize != "none":
        raise ParallelRefused(f"{asked} and quantize is {quantize}; expected none")
    if kernels not in {"auto", "module"}:
        raise ParallelRefused(f"{asked} and cpu_kernels is {kernels}; expected auto or module")
    if not torch.distributed.is_available():
        raise ParallelRefused(f"{asked}, and this build of torch has no torch.distributed")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if ranks > found:
            raise ParallelRefused(f"{asked}; expected at most the number of GPUs here, {found}")
    elif torch.cuda.is_available():
        raise ParallelRefused(
            f"{asked} and the device cpu on a machine with a GPU, which transformers would take; "
            "expected cuda, or CUDA_VISIBLE_DEVICES to hide the GPU"
        )
