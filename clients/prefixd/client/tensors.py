"""Tensors of a safetensors file that a server accepted, without numpy: float32, float16, bfloat16.

::

    | length n: 8 bytes, little endian | JSON header: n bytes | tensors |
"""

import json
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import sub

from prefixd.client.errors import ProtocolError

DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
"""safetensors' names: our name, bytes per element."""

_CHUNK_ELEMENTS = 64 * 1024


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its dtype as docs/formats.md names it, its shape, and its bytes."""

    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    data: memoryview

    def chunks(self) -> Iterator[Sequence[float]]:
        """The values in order, some at a time."""
        step = _CHUNK_ELEMENTS * self.itemsize
        for begin in range(0, len(self.data), step):
            yield _decoded(self.data[begin : begin + step], self.dtype)


def read_tensors(payload: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raise ``ProtocolError``."""
    try:
        (length,) = struct.unpack_from("<Q", payload)
        header = json.loads(payload[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in sorted(header.items()):
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype, itemsize = DTYPES[entry["dtype"]]
            data = memoryview(payload)[begin:end]
            tensors[name] = Tensor(dtype, itemsize, tuple(entry["shape"]), data)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError("the stored safetensors cannot be read") from None
    return tensors


def greatest_difference(left: Tensor, right: Tensor) -> float:
    """The greatest |left - right| of two tensors of one shape, of any dtypes."""
    return max(
        (
            max(map(abs, map(sub, ours, theirs)), default=0.0)
            for ours, theirs in zip(left.chunks(), right.chunks(), strict=True)
        ),
        default=0.0,
    )


def _decoded(data: memoryview, dtype: str) -> Sequence[float]:
    if dtype == "float16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "bfloat16":  # the upper half of a float32
        widened = bytearray(2 * len(data))
        widened[2::4], widened[3::4] = data[0::2], data[1::2]
        data = memoryview(widened)
    values = array("f")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
