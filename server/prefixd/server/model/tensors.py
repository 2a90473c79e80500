"""Replace the tensors of a module.

Setting ``data`` would be shorter, and does nothing to a tensor that is sharded over processes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Place = tuple[dict[str, Any], str, torch.Tensor]
"""The parameters or buffers of one part of a module, a name among them, and the tensor there."""


def places(module: Any, *, recurse: bool = True) -> Iterator[Place]:
    """Where ``module`` and its parts hold parameters and buffers. A shared one has several."""
    for part in module.modules() if recurse else (module,):
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
