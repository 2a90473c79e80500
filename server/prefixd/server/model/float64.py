"""Run a model in float64 for a while: how far its float32 logits are from those is its rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prefixd.server.model.memory import free_bytes
from prefixd.server.model.tensors import (
    Place,
    own_part,
    places,
    replace_tensors,
    restore_tensors,
)

_EXPERTS = "_experts_implementation"


class NoFloat64(Exception):
    """A model cannot run in float64 here."""


@contextmanager
def float64_arithmetic(module: Any) -> Iterator[None]:
    """Run ``module``, whose weights are float32, in float64 until the end of the block.

    Raises NoFloat64 where memory lacks, or weights are sharded, packed or in half precision.
    """
    floats = [place for place in places(module) if place[-1].is_floating_point()]
    device = next(module.parameters()).device
    sizes = {id(tensor): tensor.numel() for *_, tensor in floats}
    if any(
        tensor.dtype != torch.float32 or own_part(tensor) is not tensor for *_, tensor in floats
    ):
        raise NoFloat64("some weights are not whole and in float32")
    if 8 * sum(sizes.values()) > free_bytes(device) // 2:
        raise NoFloat64("the weights in float64 take more than half of the free memory")
    config = module.config
    experts = getattr(config, _EXPERTS, None)
    with _widened(floats):
        if experts is not None:
            setattr(config, _EXPERTS, "eager")  # grouped products have no float64
        try:
            yield
        finally:
            if experts is not None:
                setattr(config, _EXPERTS, experts)


@contextmanager
def _widened(floats: list[Place]) -> Iterator[None]:
    originals = replace_tensors(floats, torch.Tensor.double)
    try:
        yield
    finally:
        restore_tensors(originals)
