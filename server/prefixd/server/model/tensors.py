"""Replace the tensors of a module.

Setting ``data`` would be shorter, and does nothing to a tensor that is sharded over processes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_PACKED = frozenset(
    {
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)
"""Types of quantized weights."""

Place = tuple[dict[str, Any], str, torch.Tensor]
"""The parameters or buffers of one part of a module, a name among them, and the tensor there."""


def places(module: Any, *, recurse: bool = True) -> Iterator[Place]:
    """Where ``module`` and its parts hold parameters and buffers that may be cast. A shared one has
    several."""
    for part in module.modules() if recurse else (module,):
        if not _is_cast(part):
            continue
        for held in (vars(part)["_parameters"], vars(part)["_buffers"]):
            for name, tensor in tuple(held.items()):
                if tensor is not None:
                    yield held, name, tensor


def saved_places(module: Any) -> Iterator[Place]:
    """Those whose tensors belong to a checkpoint: no computed buffers."""
    computed = {
        (id(vars(part)["_buffers"]), name)
        for part in module.modules()
        for name in vars(part)["_non_persistent_buffers_set"]
    }
    for held, name, tensor in places(module):
        if (id(held), name) not in computed:
            yield held, name, tensor


def is_wrapped(tensor: Any) -> bool:
    """Whether a tensor is one of several under one name, such as the integers and the scales of a
    weight that torchao or quanto quantized."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor")


def is_packed(part: Any) -> bool:
    """Whether a part of a model holds quantized weights itself."""
    return not _is_cast(part) or any(is_wrapped(tensor) for tensor in _held(part))


def _is_cast(part: Any) -> bool:
    """Whether the tensors of a part may be cast: a wrapped one casts what it may, but scales of
    packed weights have the dtype that their kernels expect."""
    return not any(tensor.dtype in _PACKED for tensor in _held(part))


def _held(part: Any) -> list[torch.Tensor]:
    tensors = (*vars(part)["_parameters"].values(), *vars(part)["_buffers"].values())
    return [tensor for tensor in tensors if tensor is not None]


def unwrapped(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor by its name, or the parts of a wrapped one by names of their own."""
    if not is_wrapped(tensor):
        yield name, tensor
        return
    for inner in sorted(tensor.__tensor_flatten__()[0]):  # type: ignore[attr-defined]
        yield from unwrapped(f"{name}.{inner}", getattr(tensor, inner))


@torch.inference_mode(mode=False)  # an inference tensor cannot be a parameter
def replace_tensors(
    where: Iterable[Place], change: Callable[[torch.Tensor], torch.Tensor]
) -> list[Place]:
    """Put what ``change`` makes of each tensor in its place, a shared one once. Returns what was
    there, for ``restore_tensors``."""
    changed: dict[int, torch.Tensor] = {}
    before = []
    for held, name, tensor in where:
        if id(tensor) not in changed:
            new = change(tensor.detach())
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
            changed[id(tensor)] = new
        held[name] = changed[id(tensor)]
        before.append((held, name, tensor))
    return before


def restore_tensors(before: Iterable[Place]) -> None:
    """Undo ``replace_tensors``."""
    for held, name, tensor in before:
        held[name] = tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, gathered: a collective call of all processes."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be sharded."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()
