"""Run device code without a device: fake CUDA tensors, and a mode that refuses what would wait.

A body that runs inside ``fake_cuda()`` neither reads a value back to the host nor has a shape that
depends on one, so it can be queued without a synchronisation and captured into a CUDA graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_DEVICE = "PyTorch is not linked with support for cuda devices"
_BY_MASK = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Refused(Exception):
    """An op crosses devices, or its result depends on the data of a tensor."""


class DeviceOnly(TorchDispatchMode):
    """Refuses every op with tensors of two devices among its inputs and results, and every op that
    reads data on the host: ``item``, ``nonzero``, boolean indices, ``if tensor``.

    ``ops`` has the names of those that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors(args, kwargs)
        name = func._schema.name
        if torch.Tag.data_dependent_output in func.tags:
            raise Refused(f"{name} reads data on the host")
        if name in _BY_MASK and any(
            t.dtype in {torch.bool, torch.uint8} for t in _tensors(args[1])
        ):
            raise Refused(f"{name} by a mask has a shape that depends on data")
        if torch.Tag.dynamic_output_shape in func.tags and name not in _BY_MASK:
            raise Refused(f"{name} has a shape that depends on data")
        _refuse_two(name, inputs)  # before it runs: torch's own error is less clear
        result = func(*args, **(kwargs or {}))
        _refuse_two(name, inputs + _tensors(result))
        self.ops.append(name)
        return result


class _WithoutCuda(TorchFunctionMode):
    """Lets fake tensors be indexed where torch was built without CUDA: ``x[...]`` and ``~x`` ask
    for the device there, and the ops that they stand for do not. What still asks for it is refused.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.backends.cuda.is_built():
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            return _indexed(*args)
        if func is torch.Tensor.__setitem__:
            return _assign(*args)
        if func is torch.Tensor.__invert__:
            return torch.ops.aten.bitwise_not(*args)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if _NO_DEVICE not in str(error):
                raise
            raise Refused(f"{func.__name__} uses the device from the host") from error


@contextmanager
def fake_cuda() -> Iterator[DeviceOnly]:
    """Tensors made inside have shapes and a device and no data; make them with device="cuda"."""
    with FakeTensorMode(), _WithoutCuda(), DeviceOnly() as mode:
        yield mode


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]``, by the ops that it stands for."""
    parts, dim = list(index) if isinstance(index, tuple) else [index], 0
    if ... in parts:
        at = parts.index(...)
        missing = tensor.dim() - sum(part is not None for part in parts) + 1
        parts[at : at + 1] = [slice(None)] * missing
    for place, part in enumerate(parts):
        if isinstance(part, torch.Tensor):
            assert all(isinstance(each, torch.Tensor) for each in parts[place:]), "not needed yet"
            return torch.ops.aten.index.Tensor(tensor, [None] * dim + parts[place:])
        if part is None:
            tensor, dim = torch.unsqueeze(tensor, dim), dim + 1
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        else:
            tensor = torch.select(tensor, dim, part)
    return tensor


def _assign(tensor: torch.Tensor, index: Any, value: Any) -> None:
    """``tensor[index] = value``, by the ops that it stands for."""
    if isinstance(index, torch.Tensor):
        if not isinstance(value, torch.Tensor):
            value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
        torch.ops.aten.index_put_(tensor, [index], value)
    elif isinstance(value, torch.Tensor):
        torch.ops.aten.copy_(_indexed(tensor, index), value)
    else:
        torch.ops.aten.fill_(_indexed(tensor, index), value)


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _refuse_two(name: str, tensors: list[torch.Tensor]) -> None:
    devices = {tensor.device.type for tensor in tensors}
    if len(devices) > 1:
        raise Refused(f"{name} crosses devices: {', '.join(sorted(devices))}")
