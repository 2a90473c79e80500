"""The names that a pickle of ``torch.save`` may contain, and the plain data each stands for.

The table is fixed. An entry builds data from arguments that it checks; none is PyTorch's function.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prefixd.client.errors import FormatError

MAX_RANK = 8

MAX_ELEMENTS = 2**40
"""Product of the counts other than 0 of a shape: numpy refuses the shape of an empty array too."""

STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""PyTorch's storage classes: the dtype of their elements."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array outside the pickle: ``size`` elements under ``key``."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view into a storage, which holds all of it; ``offset`` and ``strides`` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A name such as ``torch.FloatStorage``."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Builder:
    """A name that a pickle may call."""

    build: Callable[[tuple[Any, ...]], object]


class ParameterList(list[StoredTensor]):
    """The tensors of a ``torch.nn.ParameterList``."""


def symbol(module: object, name: object) -> object:
    """What a name stands for; FormatError for every name that is not in the table."""
    key = f"{module}.{name}" if type(module) is type(name) is str else "?"
    if key not in _SYMBOLS:
        raise FormatError(f"expected a pickle of tensors, found the name {shown(key)}: refused")
    return _SYMBOLS[key]


def shown(value: object) -> str:
    """A value of a pickle for messages: short, on one line."""
    if isinstance(value, str):
        return ascii(value[:80])
    if isinstance(value, StoredTensor):
        return f"a tensor of shape {list(value.shape)}"
    if type(value) is int and abs(value) < 2**64:
        return str(value)
    return "None" if value is None else f"a {type(value).__name__}"


def pairs_of(items: list[Any]) -> Iterable[tuple[str | int, Any]]:
    """Keys and values of a dict, written one after another."""
    if len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
        raise FormatError("expected a pickle of tensors, found keys that are not names")
    return zip(items[::2], items[1::2], strict=True)


def parameters_of(state: dict[Any, Any]) -> list[StoredTensor]:
    """The tensors of a ParameterList's state: its ``_parameters`` "0", "1", …, in order."""
    parameters = state.get("_parameters")
    if type(parameters) is not dict:
        raise FormatError("damaged pickle: a ParameterList without parameters")
    tensors = [parameters.get(str(index)) for index in range(len(parameters))]
    for tensor in tensors:
        if not isinstance(tensor, StoredTensor):
            raise FormatError(f"expected a ParameterList of tensors, found {shown(tensor)} in it")
    return tensors  # type: ignore[return-value]  # every element is checked above


def storage_of(identity: object) -> Storage:
    """The storage for ``("storage", class, key, device, size)``; a sixth item, which files before
    PyTorch 1.6 have, must be None."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise FormatError(f"expected the identity of a storage, found {shown(identity)}")
    _, kind, key, _, size = identity[:5]
    if identity[5:] not in ((), (None,)):
        raise FormatError("views of storages are not read: load the file with PyTorch and save it")
    if not isinstance(kind, StorageClass) or type(key) is not str or not _is_count(size):
        raise FormatError("damaged pickle: the identity of a storage has wrong types")
    return Storage(key, kind.dtype, size)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """``(storage, offset, shape, strides, …)`` of ``torch._utils._rebuild_tensor_v2``."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise FormatError("damaged pickle: a tensor without a storage")
    storage, offset, shape, strides = arguments[:4]
    for numbers in (shape, strides):
        if type(numbers) is not tuple or not all(map(_is_count, numbers)):
            raise FormatError("damaged pickle: a tensor without shape and strides")
    if not _is_count(offset) or len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise FormatError("damaged pickle: a tensor without shape and strides")
    _check_extent(storage, offset, shape, strides)
    return StoredTensor(storage, offset, shape, strides)


def _check_extent(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    if math.prod(filter(None, shape)) > MAX_ELEMENTS:
        raise FormatError(
            f"expected at most {MAX_ELEMENTS} elements, found the shape {list(shape)}"
        )
    elements, last = 1, offset
    for count, stride in zip(shape, strides, strict=True):
        elements *= count
        last += (count - 1) * stride
    if elements and (last >= storage.size or elements > storage.size):
        raise FormatError(
            f"expected a tensor within its storage of {storage.size} elements, found "
            f"the shape {list(shape)} at {offset} with strides {list(strides)}"
        )


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    """``(tensor, requires_grad, hooks)`` of ``torch._utils._rebuild_parameter``."""
    if len(arguments) != 3 or not isinstance(arguments[0], StoredTensor):
        raise FormatError("damaged pickle: a parameter without a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Empty, or made of one list of pairs, as Python 2 wrote it."""
    if arguments == ():
        return {}
    items = arguments[0] if len(arguments) == 1 else None
    if type(items) is not list or not all(type(p) in (list, tuple) and len(p) == 2 for p in items):
        raise FormatError("damaged pickle: an OrderedDict without pairs")
    return dict(pairs_of([value for pair in items for value in pair]))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


_SYMBOLS: dict[str, object] = {
    "collections.OrderedDict": Builder(_ordered_dict),
    "torch._utils._rebuild_tensor": Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": Builder(_tensor),
    "torch._utils._rebuild_parameter": Builder(_parameter),
    "torch.nn.modules.container.ParameterList": ParameterList,
    # The state of a module holds sets of names, which are never needed; protocol 2 has Python 2's
    # name of the class.
    "builtins.set": Builder(lambda _: set()),
    "__builtin__.set": Builder(lambda _: set()),
    **{f"torch.{name}": StorageClass(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.cuda.{name}": StorageClass(dtype) for name, dtype in STORAGES.items()},
}
