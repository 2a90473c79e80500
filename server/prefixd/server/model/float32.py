"""Run a half-precision model in float32 for a while, and give its weights back bit for bit.

Rounding in bfloat16 hides differences below one percent; in float32 two correct ways of running a
model differ by a few millionths. The weights are widened (exact), never changed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from prefixd.server.model.memory import free_bytes
from prefixd.server.model.tensors import (
    Place,
    is_packed,
    places,
    replace_tensors,
    restore_tensors,
)

_HALF = frozenset({torch.float16, torch.bfloat16})


@contextmanager
def float32_arithmetic(module: Any, *, scratch_bytes: int) -> Iterator[None]:
    """Run ``module`` in float32 until the end of the block; its state is restored afterwards.

    All weights are widened at once where twice their size and ``scratch_bytes`` fit free memory,
    else those of one layer at a time, while it runs.
    """
    half = _half_places(module)
    device = next(module.parameters()).device
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for *_, tensor in half}
    widened = 2 * sum(sizes.values())
    with ExitStack() as stack:
        stack.enter_context(_full_precision_products())
        stack.enter_context(_restored_state(module))
        if not half or widened + scratch_bytes <= free_bytes(device):
            stack.enter_context(_widened(half))
        else:
            stack.enter_context(_widened_by_layer(module))
        yield


def _half_places(module: Any, *, recurse: bool = True) -> list[Place]:
    """Parameters and buffers in half precision (embeddings may be shared)."""
    return [place for place in places(module, recurse=recurse) if place[-1].dtype in _HALF]


@contextmanager
def _full_precision_products() -> Iterator[None]:
    """Matrix products in float32 proper: container images turn TF32 on by an environment variable,
    and it has the ten bits of float16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _restored_state(module: Any) -> Iterator[None]:
    """Restore buffers and attributes afterwards: some modules keep caches and rotary frequencies of
    the longest text they saw."""
    cast = [part for part in module.modules() if not is_packed(part)]
    contents = [(held, held.clone()) for part in cast for held in part.buffers(recurse=False)]
    saved = [(part, dict(vars(part)), dict(vars(part)["_buffers"])) for part in module.modules()]
    try:
        yield
    finally:
        for buffer, content in contents:
            buffer.copy_(content)
        for part, attributes, buffers in saved:
            attributes["_buffers"].clear()
            attributes["_buffers"].update(buffers)
            vars(part).clear()
            vars(part).update(attributes)


@contextmanager
def _widened(half: list[Place]) -> Iterator[None]:
    originals = replace_tensors(half, torch.Tensor.float)
    try:
        yield
    finally:
        restore_tensors(originals)


@contextmanager
def _widened_by_layer(module: Any) -> Iterator[None]:
    """Widen the weights of each part when it begins to run, and drop the wide ones when it ends."""
    with ExitStack() as hooks:
        for part, half in _parts(module):
            running: list[Place] = []

            def begin(*_: Any, half: Any = half, running: Any = running) -> None:
                running.extend(replace_tensors(half, torch.Tensor.float))

            def end(*_: Any, running: Any = running) -> None:
                restore_tensors(running)
                running.clear()

            hooks.callback(part.register_forward_pre_hook(begin).remove)
            hooks.callback(part.register_forward_hook(end, always_call=True).remove)
        yield


def _parts(module: Any) -> Iterator[tuple[Any, list[Place]]]:
    """The modules that run one after another, with their half-precision tensors: the members of
    each list of layers as a whole, and what holds weights outside (embeddings, norms, head)."""
    if half := _half_places(module, recurse=False):
        yield module, half
    for child in module.children():
        if not isinstance(child, torch.nn.ModuleList):
            yield from _parts(child)
            continue
        for layer in child:
            if half := _half_places(layer):
                yield layer, half
