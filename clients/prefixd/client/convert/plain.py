"""safetensors files of other tools than PEFT, such as the Trainer's ``model.safetensors``.

::

    length n: 8 bytes, little endian | JSON header: n bytes | tensors
"""

import json
import math
import os
from typing import Any, BinaryIO

from prefixd.client.convert.symbols import MAX_RANK, Storage, StoredTensor, shown
from prefixd.client.errors import FormatError
from prefixd.client.tensors import DTYPES

MAX_HEADER_BYTES = 1024 * 1024
"""A base of a thousand tensors has a header of 100 KiB."""

_DTYPES = {code: dtype for code, (dtype, _) in DTYPES.items()} | {"F64": "float64"}


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these 9 bytes has a safetensors header."""
    return head[8:9] == b"{"


def read_header(file: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """The tensors of an open file by name, and where the bytes of each begin. Each has a storage
    of its name. FormatError for a damaged file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(
            f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, and within the "
            f"{size} bytes of the file, found {length}"
        )
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise FormatError("damaged safetensors: the header is not valid JSON") from None
    tensors, offsets = {}, {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name], begin = _tensor(name, entry, limit=size - 8 - length)
            offsets[name] = 8 + length + begin
    return tensors, offsets


def _tensor(name: str, entry: Any, *, limit: int) -> tuple[StoredTensor, int]:
    """A tensor in C order, and where it begins behind the header."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"damaged safetensors: {shown(name)} has no shape and offsets") from None
    numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if type(code) is not str or len(shape) > MAX_RANK or not numbers or not begin <= end <= limit:
        raise FormatError(f"damaged safetensors: {shown(name)} is not within the file")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = Storage(name, _DTYPES.get(code, code[:8]), math.prod(shape))
    return StoredTensor(storage, 0, shape, strides), begin
