"""PEFT's ``adapter_model.safetensors`` against a base: names, shapes, values.

::

    PROMPT_TUNING, P_TUNING, CPT   prompt_embeddings  [P, width]
    PREFIX_TUNING, CARTRIDGE       prompt_embeddings  [P, layers * 2 * kv_heads * head_dim]
    MULTITASK_PROMPT_TUNING        prompt_embeddings  [P, width]
                                   prefix_task_cols   [tasks, P, rank]
                                   prefix_task_rows   [tasks, rank, width]

A soft prompt for an encoder-decoder has 2 P rows or columns for P, of which the first P are used.

Values are read in bounded pieces and checked after the cast to the serving dtype: 7e4 is infinite
in float16, 3.4e38 in bfloat16. Finite is not enough: 3e38 in a key poisons attention through a
masked slot.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.config import PeftConfig, check_against_base, stored_rows
from prefixd.store.artifact.kinds import MULTITASK, Kind
from prefixd.store.artifact.strict import TensorEntry, read_header, shown
from prefixd.store.errors import ArtifactRefused

Floats = npt.NDArray[np.float32]

EMBEDDINGS = "prompt_embeddings"
TASK_COLS = "prefix_task_cols"
TASK_ROWS = "prefix_task_rows"

CHUNK_ELEMENTS = 256 * 1024
"""Elements read at once: a megabyte of float32, for a file of any size."""


@dataclass(frozen=True, slots=True)
class ValueRule:
    """What values must satisfy: finite and |x| <= ``max_abs`` after the cast to ``dtype``."""

    dtype: str
    max_abs: float


@dataclass(frozen=True, slots=True)
class PeftWeights:
    """Weights whose names, dtypes and shapes are valid; ``rows`` validates the values.

    The safetensors bytes begin at byte ``start`` of ``file``. ``dtype`` is the file's, ``shape``
    the prefix's: [virtual tokens, width]. ``task_id`` is None except for MULTITASK.
    """

    file: BinaryIO
    start: int
    entries: dict[str, TensorEntry]
    rule: ValueRule
    task_id: int | None
    dtype: str
    shape: tuple[int, int]

    def rows(self) -> Iterator[tuple[int, Floats]]:
        """The prefix as (first row, [some rows, width]) float32 pieces of bounded size, MULTITASK
        folded for its task, every value validated, also of rows that are not used. Raises
        ArtifactRefused at the first bad one."""
        task_factor = None if self.task_id is None else self._task_factor(self.task_id)
        height, width = self.entries[EMBEDDINGS].shape
        step = max(1, CHUNK_ELEMENTS // width)
        for row in range(0, height, step):
            count = min(step, height - row)
            values = self._read(self.entries[EMBEDDINGS], first=row * width, count=count * width)
            values = values.reshape(count, width)
            if task_factor is not None and self.task_id is not None:
                values = self._fold(values, task_factor, task=self.task_id, first_row=row)
            check_range(values, self.rule, first_row=row, name=EMBEDDINGS)
            if row < self.shape[0]:
                yield row, values[: self.shape[0] - row]

    def load(self) -> Floats:
        """The whole validated prefix, [virtual tokens, width] float32."""
        result = np.empty(self.shape, dtype=np.float32)
        for first_row, values in self.rows():
            result[first_row : first_row + len(values)] = values
        return result

    def _task_factor(self, task: int) -> Floats:
        """``rows[task]``, [rank, width], once both task tensors are known to be finite.

        The other tasks are never used, but an artifact with NaN in them is refused all the same.
        """
        cols, rows = self.entries[TASK_COLS], self.entries[TASK_ROWS]
        for entry in (cols, rows):
            for first in range(0, entry.size, CHUNK_ELEMENTS):
                self._read(entry, first=first, count=min(CHUNK_ELEMENTS, entry.size - first))
        _, rank, width = rows.shape
        values = self._read(rows, first=task * rank * width, count=rank * width)
        return values.reshape(rank, width)

    def _fold(self, values: Floats, factor: Floats, *, task: int, first_row: int) -> Floats:
        """``prompt_embeddings * (cols[task] @ rows[task])``: PEFT's MultitaskPromptEmbedding."""
        cols = self.entries[TASK_COLS]
        _, height, rank = cols.shape
        first = (task * height + first_row) * rank
        left = self._read(cols, first=first, count=len(values) * rank)
        with np.errstate(over="ignore", invalid="ignore"):  # checked by the caller
            return values * (left.reshape(len(values), rank) @ factor)

    def _read(self, entry: TensorEntry, *, first: int, count: int) -> Floats:
        return read_values(self.file, self.start, entry, first=first, count=count)


def read_values(
    file: BinaryIO, start: int, entry: TensorEntry, *, first: int, count: int
) -> Floats:
    """Elements ``first .. first + count`` of a flat tensor, as float32 and as stored. The
    safetensors bytes begin at byte ``start`` of ``file``.

    Raises ArtifactRefused ``non_finite`` when one is NaN or infinite.
    """
    file.seek(start + entry.offset + first * entry.itemsize)
    raw = file.read(count * entry.itemsize)
    if len(raw) != count * entry.itemsize:
        raise ArtifactRefused("truncated", f"tensor {entry.name} ends early", param=entry.name)
    values = _decode(raw, entry.dtype)
    finite = np.isfinite(values)
    if not finite.all():
        index = np.unravel_index(first + int(np.argmin(finite)), entry.shape)
        place = "[" + ", ".join(str(int(i)) for i in index) + "]"
        raise ArtifactRefused(
            "non_finite",
            f"tensor {entry.name}: expected finite values, got NaN or infinity at {place}",
            param=entry.name,
        )
    return values


def open_weights(
    file: BinaryIO,
    *,
    start: int,
    size: int,
    config: PeftConfig,
    base: BaseSpec,
    task_id: int | None,
) -> PeftWeights:
    """Check the header of the ``size`` safetensors bytes at ``start`` against config and base.

    No size that the config or the header states is allocated before both are within bounds.
    Raises ArtifactRefused.
    """
    multitask = config.peft_type == MULTITASK
    refuse_task_id(config, task_id)
    names = {EMBEDDINGS, TASK_COLS, TASK_ROWS} if multitask else {EMBEDDINGS}
    file.seek(start)
    entries = read_header(file, size=size, allowed=frozenset(names))
    check_against_base(config, base)
    require_one_dtype(entries)
    rows = stored_rows(config, base)
    _check_embeddings(entries[EMBEDDINGS], config, base, rows=rows)
    if multitask:
        task_id = _check_tasks(entries, base, task_id, rows=rows)
    limit = base.max_abs_kv if config.kind is Kind.KV_PREFIX else base.max_abs_embedding
    width = entries[EMBEDDINGS].shape[1]
    return PeftWeights(
        file=file,
        start=start,
        entries=entries,
        rule=ValueRule(base.dtype, limit),
        task_id=task_id,
        dtype=entries[EMBEDDINGS].dtype,
        shape=(config.num_virtual_tokens, width),
    )


def refuse_task_id(config: PeftConfig, task_id: int | None) -> None:
    """Raise ArtifactRefused for the task id of another type than MULTITASK."""
    if task_id is not None and config.peft_type != MULTITASK:
        raise ArtifactRefused(
            "unexpected_task_id",
            f"a task id belongs to {MULTITASK}, but this is {config.peft_type}",
            param="task_id",
        )


def require_one_dtype(entries: dict[str, TensorEntry]) -> str:
    """The dtype of all tensors; raises ArtifactRefused where they differ."""
    first, *others = sorted({entry.dtype for entry in entries.values()})
    if others:
        message = f"expected all tensors in one dtype, got {', '.join([first, *others])}"
        raise ArtifactRefused("wrong_dtype", message, param="weights")
    return first


def _check_embeddings(entry: TensorEntry, config: PeftConfig, base: BaseSpec, *, rows: int) -> None:
    width, meaning = base.embedding_width, "embedding width"
    if config.kind is Kind.KV_PREFIX:
        width = base.kv_width
        meaning = (
            f"{base.prefix_layers} layers x 2 x {base.num_kv_heads} KV heads x "
            f"head size {base.head_dim}"
        )
    count = "" if rows == config.num_virtual_tokens else "2 x "
    check_shape(
        entry, (rows, width), f"{count}num_virtual_tokens, and {meaning} of the base {base.name}"
    )


def _check_tasks(
    entries: dict[str, TensorEntry], base: BaseSpec, task_id: int | None, *, rows: int
) -> int:
    cols, factors = entries[TASK_COLS], entries[TASK_ROWS]
    tasks = cols.shape[0] if cols.shape else 0
    rank = cols.shape[-1] if cols.shape else 0
    if len(cols.shape) != 3 or not 1 <= rank <= base.embedding_width or tasks < 1:
        raise ArtifactRefused(
            "wrong_shape",
            f"tensor {cols.name}: expected [tasks, {rows}, rank] with a rank "
            f"from 1 to {base.embedding_width}, got {_written(cols.shape)}",
            param=cols.name,
        )
    check_shape(cols, (tasks, rows, rank), "tasks, rows of prompt_embeddings and rank")
    check_shape(factors, (tasks, rank, base.embedding_width), "tasks, rank and embedding width")
    if task_id is None:
        raise ArtifactRefused(
            "task_id_required",
            f"{MULTITASK} holds {tasks} task(s): choose one at upload with the metadata "
            f'{{"task_id": n}}, n from 0 to {tasks - 1}',
            param="task_id",
        )
    if not 0 <= task_id < tasks:
        raise ArtifactRefused(
            "task_id_out_of_range",
            f"expected a task id from 0 to {tasks - 1}, got {shown(task_id)}",
            param="task_id",
        )
    return task_id


def check_shape(entry: TensorEntry, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ArtifactRefused for another shape; ``meaning`` says what the extents are."""
    if entry.shape != expected:
        raise ArtifactRefused(
            "wrong_shape",
            f"tensor {entry.name}: expected {_written(expected)} ({meaning}), got "
            f"{_written(entry.shape)}",
            param=entry.name,
        )


def _written(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(shown(extent) for extent in shape) + "]"


def check_range(values: Floats, rule: ValueRule, *, first_row: int, name: str) -> None:
    """Check [rows, width] values after the cast to ``rule.dtype``; raise ArtifactRefused."""
    served = np.abs(cast(values, rule.dtype))
    # A folded product may overflow, and infinity times zero is NaN, which the cast may hide.
    valid = np.isfinite(values) & (served <= rule.max_abs)
    if valid.all():
        return
    row, column = np.unravel_index(int(np.argmin(valid)), valid.shape)
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
    """``values`` rounded to ``dtype``, to nearest even, and widened to float32 again."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        # The upper half of a float32. Adding just under half a unit of the discarded bits, and one
        # more when the last kept bit is odd, rounds to nearest even. NaN would not survive, but
        # ``check_range`` tests the uncast values too, and infinity has no bits to carry.
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


def _magnitude(value: float) -> str:
    """The size of a refused value, to one digit: no exact tensor value reaches a log."""
    return f", about {abs(value):.0e}," if math.isfinite(value) else ""
