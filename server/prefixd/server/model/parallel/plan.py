"""Which models and settings can be served by several processes; others are refused by name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefixd.server.model.architecture import Shape, UnsupportedModel

_HEADS = ("q_proj", "k_proj", "v_proj")
"""The projections that a plan must cut by head, as attention and the KV pool are cut."""


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


def refuse_indivisible(config: Any, *, ranks: int) -> None:
    """Raise UnsupportedModel for the config of a model that ``ranks`` processes cannot share."""
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None) or {}
    cut = {name.rpartition(".")[2] for name, style in plan.items() if style == "colwise"}
    if not cut.issuperset(_HEADS):
        raise UnsupportedModel(
            f"{config.model_type}: transformers has no plan that cuts its attention by head, so "
            "it cannot be served with tensor_parallel"
        )
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    for what, count in (("KV heads", kv_heads), ("attention heads", heads)):
        if count % ranks:
            fitting = [str(n) for n in range(2, kv_heads + 1) if kv_heads % n == heads % n == 0]
            expected = " or ".join(fitting) or "1, which is no tensor parallel"
            raise UnsupportedModel(
                f"{config.model_type} has {count} {what}, which {ranks} ranks cannot share "
                f"evenly; expected a tensor_parallel of {expected}"
            )


def local_shape(shape: Shape, *, ranks: int) -> Shape:
    """What one rank holds of a model's heads."""
    return replace(
        shape, num_heads=shape.num_heads // ranks, num_kv_heads=shape.num_kv_heads // ranks
    )
