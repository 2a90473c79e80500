"""PEFT's adaption prompt (LLaMA-Adapter) against a base: names, shapes, values.

::

    base_model.model.LAYER.adaption_prompt   [1, adapter_len, width]
    base_model.model.LAYER.adaption_gate     [1]

for the attention module LAYER of each of the last ``adapter_layers`` layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.config import PeftConfig, check_against_base
from prefixd.store.artifact.strict import TensorEntry, read_header
from prefixd.store.artifact.weights import (
    CHUNK_ELEMENTS,
    Floats,
    ValueRule,
    check_range,
    check_shape,
    read_values,
    refuse_task_id,
    require_one_dtype,
)

MAX_ABS = 1024.0
"""A bound of |x|. PEFT begins with normally distributed values, and what the same products read in
ordinary layers is normalised to about 1."""

_KIND = "adaption_"


@dataclass(frozen=True, slots=True)
class AdaptionWeights:
    """Weights whose names, dtypes and shapes are valid; ``rows`` validates the values. As of
    PeftWeights: ``shape`` is [layers * rows, width], the lowest adapted layer first."""

    file: BinaryIO
    start: int
    prompts: tuple[TensorEntry, ...]
    gate_entries: tuple[TensorEntry, ...]
    rule: ValueRule
    dtype: str
    shape: tuple[int, int]
    task_id: None = None

    def rows(self) -> Iterator[tuple[int, Floats]]:
        """The prompts as (first row, [some rows, width]) float32 pieces of bounded size; every
        value and gate validated. Raises ArtifactRefused at the first bad one."""
        self.gates()
        height, width = self.shape[0] // len(self.prompts), self.shape[1]
        step = max(1, CHUNK_ELEMENTS // width)
        for index, entry in enumerate(self.prompts):
            for row in range(0, height, step):
                count = min(step, height - row)
                values = self._read(entry, first=row * width, count=count * width)
                values = values.reshape(count, width)
                check_range(values, self.rule, first_row=row, name=entry.name)
                yield index * height + row, values

    def load(self) -> Floats:
        """All validated prompts, [layers * rows, width] float32."""
        result = np.empty(self.shape, dtype=np.float32)
        for first_row, values in self.rows():
            result[first_row : first_row + len(values)] = values
        return result

    def gates(self) -> Floats:
        """The validated gates, [layers] float32."""
        values = [self._read(entry, first=0, count=1) for entry in self.gate_entries]
        for entry, gate in zip(self.gate_entries, values, strict=True):
            check_range(gate[None], self.rule, first_row=0, name=entry.name)
        return np.concatenate(values)

    def _read(self, entry: TensorEntry, *, first: int, count: int) -> Floats:
        return read_values(self.file, self.start, entry, first=first, count=count)


def open_adaption(
    file: BinaryIO,
    *,
    start: int,
    size: int,
    config: PeftConfig,
    base: BaseSpec,
    task_id: int | None,
) -> AdaptionWeights:
    """Check the header of the ``size`` safetensors bytes at ``start`` against config and base.

    No size that the config or the header states is allocated before both are within bounds.
    Raises ArtifactRefused.
    """
    refuse_task_id(config, task_id)
    check_against_base(config, base)
    assert base.attention_module is not None
    layers = range(base.num_layers - config.adapter_layers, base.num_layers)
    places = [f"base_model.model.{base.attention_module.format(layer)}" for layer in layers]
    allowed = {f"{place}.{_KIND}{part}" for place in places for part in ("prompt", "gate")}
    file.seek(start)
    entries = read_header(file, size=size, allowed=frozenset(allowed))
    dtype = require_one_dtype(entries)
    prompts = tuple(entries[f"{place}.{_KIND}prompt"] for place in places)
    gates = tuple(entries[f"{place}.{_KIND}gate"] for place in places)
    width = base.embedding_width
    for entry in prompts:
        meaning = f"one, adapter_len, and hidden size of the base {base.name}"
        check_shape(entry, (1, config.num_virtual_tokens, width), meaning)
    for entry in gates:
        check_shape(entry, (1,), "one gate")
    return AdaptionWeights(
        file=file,
        start=start,
        prompts=prompts,
        gate_entries=gates,
        rule=ValueRule(base.dtype, MAX_ABS),
        dtype=dtype,
        shape=(len(prompts) * config.num_virtual_tokens, width),
    )
