"""PEFT's ``adapter_model.safetensors`` against a base: names, shapes, values.

::

    PROMPT_TUNING, P_TUNING, CPT   prompt_embeddings  [P, hidden]
    PREFIX_TUNING, CARTRIDGE       prompt_embeddings  [P, layers * 2 * kv_heads * head_dim]
    MULTITASK_PROMPT_TUNING        prompt_embeddings  [P, hidden]
                                   prefix_task_cols   [tasks, P, rank]
                                   prefix_task_rows   [tasks, rank, hidden]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from prefixd.store.artifact.base import BaseSpec
from prefixd.store.artifact.peft_config import MULTITASK, Kind, PeftConfig, check_against_base
from prefixd.store.artifact.safetensors_strict import TensorEntry, read_header
from prefixd.store.artifact.strict_json import shown
from prefixd.store.artifact.values import Floats, TensorReader, ValueRule, check_range
from prefixd.store.errors import ArtifactRefused

EMBEDDINGS = "prompt_embeddings"
TASK_COLS = "prefix_task_cols"
TASK_ROWS = "prefix_task_rows"


@dataclass(frozen=True, slots=True)
class PeftWeights:
    """Weights whose names, dtypes and shapes are right; ``rows`` judges the values."""

    reader: TensorReader
    entries: dict[str, TensorEntry]
    rule: ValueRule
    task_id: int | None

    @property
    def dtype(self) -> str:
        """dtype of the file."""
        return self.entries[EMBEDDINGS].dtype

    @property
    def shape(self) -> tuple[int, int]:
        """[virtual tokens, width] of the prefix."""
        height, width = self.entries[EMBEDDINGS].shape
        return height, width

    def rows(self) -> Iterator[tuple[int, Floats]]:
        """The prefix as (first row, [some rows, width]) float32 pieces of bounded size, MULTITASK
        folded for its task, every value judged. Raises ArtifactRefused at the first bad one."""
        pieces = self.reader.rows(self.entries[EMBEDDINGS])
        if self.task_id is not None:
            pieces = self._fold(pieces, self.task_id)
        for first_row, values in pieces:
            check_range(values, self.rule, first_row=first_row, name=EMBEDDINGS)
            yield first_row, values

    def load(self) -> Floats:
        """The whole judged prefix, [virtual tokens, width] float32."""
        result = np.empty(self.shape, dtype=np.float32)
        for first_row, values in self.rows():
            result[first_row : first_row + len(values)] = values
        return result

    def _fold(
        self, pieces: Iterator[tuple[int, Floats]], task: int
    ) -> Iterator[tuple[int, Floats]]:
        """``prompt_embeddings * (cols[task] @ rows[task])``: PEFT's MultitaskPromptEmbedding."""
        cols, rows = self.entries[TASK_COLS], self.entries[TASK_ROWS]
        _, height, rank = cols.shape
        _, _, width = rows.shape
        # The other tasks are never used; what is stored is sound all the same.
        self.reader.scan(cols)
        self.reader.scan(rows)
        right = self.reader.read(rows, first=task * rank * width, count=rank * width)
        right = right.reshape(rank, width)
        for first_row, values in pieces:
            first = (task * height + first_row) * rank
            left = self.reader.read(cols, first=first, count=len(values) * rank)
            with np.errstate(over="ignore", invalid="ignore"):  # judged by the caller
                yield first_row, values * (left.reshape(len(values), rank) @ right)


def open_weights(
    file: BinaryIO,
    *,
    start: int,
    size: int,
    config: PeftConfig,
    base: BaseSpec,
    task_id: int | None,
) -> PeftWeights:
    """Judge the header of the ``size`` safetensors bytes at ``start`` against config and base.

    Nothing is allocated by what the config or the header say before both are within bounds.
    Raises ArtifactRefused.
    """
    multitask = config.peft_type == MULTITASK
    if task_id is not None and not multitask:
        raise ArtifactRefused(
            "unexpected_task_id",
            f"a task id belongs to {MULTITASK}, but this is {config.peft_type}",
            param="task_id",
        )
    names = {EMBEDDINGS, TASK_COLS, TASK_ROWS} if multitask else {EMBEDDINGS}
    file.seek(start)
    entries = read_header(file, size=size, allowed=frozenset(names))
    check_against_base(config, base)
    _check_one_dtype(entries)
    _check_embeddings(entries[EMBEDDINGS], config, base)
    if multitask:
        task_id = _check_tasks(entries, config, base, task_id)
    limit = base.max_abs_kv if config.kind is Kind.KV_PREFIX else base.max_abs_embedding
    reader = TensorReader(file, start=start)
    return PeftWeights(reader, entries, ValueRule(base.dtype, limit), task_id)


def _check_one_dtype(entries: dict[str, TensorEntry]) -> None:
    dtypes = sorted({entry.dtype for entry in entries.values()})
    if len(dtypes) > 1:
        raise ArtifactRefused(
            "wrong_dtype",
            f"expected all tensors in one dtype, got {', '.join(dtypes)}",
            param="weights",
        )


def _check_embeddings(entry: TensorEntry, config: PeftConfig, base: BaseSpec) -> None:
    width, meaning = base.hidden_size, "hidden size"
    if config.kind is Kind.KV_PREFIX:
        width = base.kv_width
        meaning = (
            f"{base.num_layers} layers x 2 x {base.num_kv_heads} KV heads x "
            f"head size {base.head_dim}"
        )
    _check_shape(
        entry,
        (config.num_virtual_tokens, width),
        f"num_virtual_tokens, and {meaning} of the base {base.name}",
    )


def _check_tasks(
    entries: dict[str, TensorEntry], config: PeftConfig, base: BaseSpec, task_id: int | None
) -> int:
    cols, rows = entries[TASK_COLS], entries[TASK_ROWS]
    tasks = cols.shape[0] if cols.shape else 0
    rank = cols.shape[-1] if cols.shape else 0
    if len(cols.shape) != 3 or not 1 <= rank <= base.hidden_size or tasks < 1:
        raise ArtifactRefused(
            "wrong_shape",
            f"tensor {cols.name}: expected [tasks, {config.num_virtual_tokens}, rank] with a rank "
            f"from 1 to {base.hidden_size}, got {_written(cols.shape)}",
            param=cols.name,
        )
    _check_shape(
        cols, (tasks, config.num_virtual_tokens, rank), "tasks, num_virtual_tokens and rank"
    )
    _check_shape(rows, (tasks, rank, base.hidden_size), "tasks, rank and hidden size")
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


def _check_shape(entry: TensorEntry, expected: tuple[int, ...], meaning: str) -> None:
    if entry.shape != expected:
        raise ArtifactRefused(
            "wrong_shape",
            f"tensor {entry.name}: expected {_written(expected)} ({meaning}), got "
            f"{_written(entry.shape)}",
            param=entry.name,
        )


def _written(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(shown(extent) for extent in shape) + "]"
