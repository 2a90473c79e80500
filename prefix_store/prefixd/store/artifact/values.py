"""Tensor values from strangers: read in bounded pieces, judged after the cast to the serving dtype.

A value that is fine in the file may not be in the pool: 7e4 is infinite in float16, 3.4e38 in
bfloat16. And finite is not enough: 3e38 in a key poisons attention through a masked slot.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from prefixd.store.artifact.safetensors_strict import TensorEntry
from prefixd.store.errors import ArtifactRefused

Floats = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 256 * 1024
"""Elements held at once while judging: a megabyte of float32, whatever the file's size."""


@dataclass(frozen=True, slots=True)
class ValueRule:
    """What values must keep: finite and |x| <= ``max_abs`` once cast to ``dtype``."""

    dtype: str
    max_abs: float


class TensorReader:
    """Reads the tensors of one safetensors file that begins at byte ``start`` of ``file``."""

    def __init__(self, file: BinaryIO, *, start: int) -> None:
        self._file = file
        self._start = start

    def read(self, entry: TensorEntry, *, first: int, count: int) -> Floats:
        """Elements ``first .. first + count`` of the flat tensor, as float32 and as stored.

        Raises ArtifactRefused ``non_finite`` when one is NaN or infinite.
        """
        self._file.seek(self._start + entry.offset + first * entry.itemsize)
        raw = self._file.read(count * entry.itemsize)
        if len(raw) != count * entry.itemsize:
            raise ArtifactRefused("truncated", f"tensor {entry.name} ends early", param=entry.name)
        values = _decode(raw, entry.dtype)
        finite = np.isfinite(values)
        if not finite.all():
            place = _place(first + int(np.argmin(finite)), entry.shape)
            raise ArtifactRefused(
                "non_finite",
                f"tensor {entry.name}: expected finite values, got NaN or infinity at {place}",
                param=entry.name,
            )
        return values

    def rows(self, entry: TensorEntry) -> Iterator[tuple[int, Floats]]:
        """A [rows, width] tensor as (first row, [some rows, width]) pieces of bounded size."""
        height, width = entry.shape
        step = max(1, CHUNK_ELEMENTS // width)
        for row in range(0, height, step):
            count = min(step, height - row)
            flat = self.read(entry, first=row * width, count=count * width)
            yield row, flat.reshape(count, width)

    def scan(self, entry: TensorEntry) -> None:
        """Read a tensor for no other purpose than to refuse what is not finite."""
        for first in range(0, entry.size, CHUNK_ELEMENTS):
            self.read(entry, first=first, count=min(CHUNK_ELEMENTS, entry.size - first))


def check_range(values: Floats, rule: ValueRule, *, first_row: int, name: str) -> None:
    """Judge [rows, width] values after the cast to ``rule.dtype``; raise ArtifactRefused."""
    served = np.abs(cast(values, rule.dtype))
    # A folded product may have overflowed, and infinity times zero is NaN, which a cast may hide.
    good = np.isfinite(values) & (served <= rule.max_abs)
    if good.all():
        return
    row, column = np.unravel_index(int(np.argmin(good)), good.shape)
    place = f"row {first_row + int(row)}, column {int(column)}"
    if not math.isfinite(float(served[row, column])):
        raise ArtifactRefused(
            "out_of_range",
            f"tensor {name}: expected values that stay finite in {rule.dtype}, the serving dtype; "
            f"the one at {place}{_magnitude(float(values[row, column]))} does not",
            param=name,
        )
    raise ArtifactRefused(
        "out_of_range",
        f"tensor {name}: expected |x| <= {rule.max_abs:g} for this base, got about "
        f"{float(served[row, column]):.0e} at {place}",
        param=name,
    )


def cast(values: Floats, dtype: str) -> Floats:
    """``values`` as they are once rounded to ``dtype``, to nearest even, and widened again."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        # The upper half of a float32. Adding just under half a unit of what is cut off, and one
        # more when the last kept bit is odd, rounds to nearest even; NaN would not survive, but
        # only finite values come here, and infinity has nothing to carry.
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32)
    raise ValueError(f"unknown serving dtype {dtype!r}")


def _decode(raw: bytes, dtype: str) -> Floats:
    if dtype == "float32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32, copy=False)
    if dtype == "float16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    upper = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
    return (upper << 16).view(np.float32)


def _place(index: int, shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(int(i)) for i in np.unravel_index(index, shape)) + "]"


def _magnitude(value: float) -> str:
    """The size of a refused value, to one digit: enough to act on, and no tensor value in a log."""
    return f", about {abs(value):.0e}," if math.isfinite(value) else ""
