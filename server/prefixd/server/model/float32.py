"""Run a half-precision model in float32 for a while, and give its weights back bit for bit.

Rounding in bfloat16 hides differences below one percent; in float32 two correct ways of running a
model differ by a few millionths. The weights are widened (exact), never changed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from prefixd.server.model.memory import free_bytes

_HALF = frozenset({torch.float16, torch.bfloat16})


@contextmanager
def float32_arithmetic(module: Any, *, scratch_bytes: int) -> Iterator[None]:
    """Run ``module`` in float32 until the end of the block; its state is restored afterwards.

    All weights are widened at once where twice their size and ``scratch_bytes`` fit free memory,
    else those of one layer at a time, while it runs.
    """
    half = _half_tensors(module)
    device = next(module.parameters()).device
    widened = 2 * sum(tensor.numel() * tensor.element_size() for tensor in half)
    with ExitStack() as stack:
        stack.enter_context(_full_precision_products())
        stack.enter_context(_restored_state(module))
        if not half or widened + scratch_bytes <= free_bytes(device):
            stack.enter_context(_widened(half))
        else:
            stack.enter_context(_widened_by_layer(module))
        yield


def _half_tensors(module: Any, *, recurse: bool = True) -> list[torch.Tensor]:
    """Parameters and buffers in half precision, each once (embeddings may be shared)."""
    tensors = (*module.parameters(recurse=recurse), *module.buffers(recurse=recurse))
    return list({id(tensor): tensor for tensor in tensors if tensor.dtype in _HALF}.values())


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
    contents = [(buffer, buffer.clone()) for buffer in module.buffers()]
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
def _widened(tensors: list[torch.Tensor]) -> Iterator[None]:
    originals = _widen(tensors)
    try:
        yield
    finally:
        _restore(originals)


@torch.inference_mode(mode=False)  # an inference tensor cannot replace the data of a parameter
def _widen(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    originals = [(tensor, tensor.data) for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    return originals


def _restore(originals: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, data in originals:
        tensor.data = data


@contextmanager
def _widened_by_layer(module: Any) -> Iterator[None]:
    """Widen the weights of each part when it begins to run, and drop the wide ones when it ends."""
    with ExitStack() as hooks:
        for part, tensors in _parts(module):
            running: list[tuple[torch.Tensor, torch.Tensor]] = []

            def begin(*_: Any, tensors: Any = tensors, running: Any = running) -> None:
                running.extend(_widen(tensors))

            def end(*_: Any, running: Any = running) -> None:
                _restore(running)
                running.clear()

            hooks.callback(part.register_forward_pre_hook(begin).remove)
            hooks.callback(part.register_forward_hook(end, always_call=True).remove)
        yield


def _parts(module: Any) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """The modules that run one after another, with their half-precision tensors: the members of
    each list of layers as a whole, and what holds weights outside (embeddings, norms, head)."""
    if tensors := _half_tensors(module, recurse=False):
        yield module, tensors
    for child in module.children():
        if not isinstance(child, torch.nn.ModuleList):
            yield from _parts(child)
            continue
        for layer in child:
            if tensors := _half_tensors(layer):
                yield layer, tensors
