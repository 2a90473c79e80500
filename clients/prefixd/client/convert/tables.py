"""Arrays of ``numpy.save``, and the two kinds of prompt tables made of them: TensorRT-LLM's
``.npy`` and KoboldAI's ``.zip`` of ``tensor.npy`` and ``meta.json``.

The header is parsed here by one pattern: numpy's own reader evaluates it as a Python literal, and
reads pickles where the dtype is ``object``.
"""

import io
import json
import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prefixd.client.convert.archives import opened_archive, read_entry
from prefixd.client.convert.symbols import MAX_ELEMENTS, MAX_RANK
from prefixd.client.convert.tensors import Tensor, check_size, tensor_of
from prefixd.client.errors import FormatError

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 4096
MAX_KOBOLD_BYTES = 256 * 1024 * 1024
"""KoboldAI accepts fewer than 2048 tokens."""
MAX_META_BYTES = 16 * 1024

META_FIELDS = ("name", "author", "description", "supported")

_HEADER = re.compile(
    r"\{'descr': '(?P<order>[<>|=]?)(?P<kind>[a-zA-Z])(?P<size>\d{0,3})', "
    r"'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,12}L?, ?)*(?:\d{1,12}L?)?)\),? ?\}\s*"
)

_DTYPES = {"f4": "float32", "f2": "float16", "f8": "float64", "V2": "bfloat16", "u2": "bfloat16"}
"""numpy has no bfloat16: it is saved as raw or as unsigned 16-bit words."""


def read_array(file: BinaryIO, *, size: int, name: str) -> Tensor:
    """The array in the ``size`` bytes of a file of ``numpy.save``, in C order.

    FormatError unless the header is one that numpy writes, for numbers, and states the size.
    """
    head = file.read(8)
    width = 2 if head[6:7] == b"\x01" else 4
    length = int.from_bytes(file.read(width), "little")
    if head[:6] != MAGIC or head[6:7] not in (b"\x01", b"\x02", b"\x03"):
        raise FormatError(f"{name}: expected a file of numpy.save")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{name}: expected a header of at most {MAX_HEADER_BYTES} bytes, found {length}"
        )
    header = file.read(length).decode("latin-1")
    match = _HEADER.fullmatch(header)
    if match is None:
        raise FormatError(f"{name}: expected numpy's header of a table, found {header[:80]!a}")
    code = match["kind"] + match["size"]
    if code not in _DTYPES:
        dtype_name = "Python objects, which are a pickle" if match["kind"] == "O" else code
        raise FormatError(f"{name}: expected floating-point numbers, found {dtype_name}")
    shape = tuple(int(number) for number in re.findall(r"\d+", match["shape"]))
    if len(shape) > MAX_RANK or math.prod(filter(None, shape)) > MAX_ELEMENTS:
        raise FormatError(f"{name}: expected a table, found {len(shape)} axes: {str(shape)[:80]}")
    check_size(shape, name=name, itemsize=int(match["size"]))
    expected, received = math.prod(shape) * int(match["size"]), size - 8 - width - length
    if expected != received:
        raise FormatError(
            f"{name}: expected {expected} bytes for the shape {list(shape)}, found {received}"
        )
    dtype = np.dtype((match["order"] if match["order"] in "<>" else "<") + code.replace("V", "u"))
    values = np.frombuffer(file.read(expected), dtype=dtype)
    values = values.reshape(shape, order="F" if match["fortran"] == "True" else "C")
    return tensor_of(
        np.ascontiguousarray(values, dtype=dtype.newbyteorder("<")), _DTYPES[code], name=name
    )


def read_table(path: Path) -> Tensor:
    """The array in a ``.npy`` file."""
    with path.open("rb") as file:
        return read_array(file, size=path.stat().st_size, name="table")


def read_kobold(path: Path) -> tuple[Tensor, dict[str, object]]:
    """The array of a KoboldAI soft prompt, and its name, author, description and supported
    models."""
    with opened_archive(path) as archive:
        data = read_entry(archive, "tensor.npy", limit=MAX_KOBOLD_BYTES)
        meta: object = {}
        if "meta.json" in archive.NameToInfo:
            try:
                meta = json.loads(
                    read_entry(archive, "meta.json", limit=MAX_META_BYTES),
                    parse_constant=_refuse_constant,
                )
            except (ValueError, RecursionError):
                raise FormatError("meta.json is not valid JSON") from None
    if not isinstance(meta, dict):
        raise FormatError("expected meta.json to be a JSON object")
    tensor = read_array(io.BytesIO(data), size=len(data), name="tensor.npy")
    return tensor, {key: meta[key] for key in META_FIELDS if meta.get(key) not in (None, "", [])}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
