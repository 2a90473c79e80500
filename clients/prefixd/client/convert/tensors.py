"""Tensors between formats, with numpy alone: bfloat16 is carried as its 16-bit words."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prefixd.client.convert.symbols import StoredTensor
from prefixd.client.errors import FormatError
from prefixd.client.tensors import DTYPES

Array = npt.NDArray[Any]

MAX_BYTES = 1024**3
"""Largest prefix that is converted; servers accept 256 MiB unless they are set otherwise."""

NUMPY_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}
"""How the elements of a float dtype are read; those of bfloat16 as words."""

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """``dtype`` is float32, float16 or bfloat16; ``values`` of bfloat16 are uint16 words."""

    dtype: str
    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape

    def replace(self, values: Array) -> "Tensor":
        """Other values of the same dtype."""
        return Tensor(self.dtype, values)


def tensor_of(values: Array, dtype: str, *, name: str) -> Tensor:
    """A tensor from values as read; float64 is rounded to float32. FormatError for other dtypes."""
    if dtype not in NUMPY_DTYPES:
        raise FormatError(f"{name}: expected floating-point numbers, found {dtype}")
    if dtype == "float64":
        with np.errstate(over="ignore"):  # infinity: the server refuses it by name
            return Tensor("float32", values.astype(np.float32))
    return Tensor(dtype, values)


def view_of(storage: Array, stored: StoredTensor) -> Array:
    """The values of a stored tensor. The tensor is within its storage; so must the storage be."""
    itemsize = storage.itemsize
    strides = [stride * itemsize for stride in stored.strides]
    begin = storage[stored.offset :]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(begin, stored.shape, strides))


def widened(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The values as float32, exactly."""
    if tensor.dtype == "bfloat16":
        return (tensor.values.astype(np.uint32) << 16).view(np.float32)
    return tensor.values.astype(np.float32)


def same_dtype(tensors: Sequence[Tensor], *, name: str) -> str:
    """The one dtype of some tensors; FormatError when they have several."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1:
        raise FormatError(f"{name}: expected one dtype, found {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def check_size(shape: Sequence[int], *, name: str, itemsize: int = 4) -> None:
    """FormatError when values of this shape have more than ``MAX_BYTES``."""
    size = itemsize
    for count in shape:
        size *= count
    if size > MAX_BYTES:
        raise FormatError(f"{name}: expected at most {MAX_BYTES} bytes of values, found {size}")


def write_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, object] = {}
    payloads, position = [], 0
    for name, tensor in sorted(tensors.items()):
        payload = np.ascontiguousarray(tensor.values).tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(payload)],
        }
        payloads.append(payload)
        position += len(payload)
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join((struct.pack("<Q", len(text)), text, *payloads))
