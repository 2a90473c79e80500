"""States in the side blocks of the KV pool, and the mixers of a pass that read and write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefixd.server.model.mixers import Mixer, MixerCache, one_by_one, output_of
from prefixd.server.model.rows import Row
from prefixd.server.model.states import StateLayout
from prefixd.server.model.transfer import on_device


class StatePool:
    """Bytes of side blocks in ``tensor``, whose first two dimensions are planes and blocks."""

    def __init__(self, layout: StateLayout, tensor: torch.Tensor) -> None:
        planes, self._blocks_per_plane = tensor.shape[:2]
        self._cells = tensor.view(planes * self._blocks_per_plane, -1).view(torch.uint8)
        self.layout = layout

    def rows_of(self, side_blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        """The cells [sequences, cells] of sequences with these side blocks, on the device."""
        rows = self.layout.rows(side_blocks, blocks_per_plane=self._blocks_per_plane)
        return on_device(rows, self._cells.device)

    def read(self, mixer: int, rows: torch.Tensor) -> torch.Tensor:
        """A copy of a mixer's states: [R, bytes of its cells]."""
        cells = rows[:, self.layout.cells[mixer]]
        return self._cells.index_select(0, cells.flatten()).view(len(rows), -1)

    def zeros(self, mixer: int, count: int) -> torch.Tensor:
        """Memory for the states of ``count`` sequences that have none yet."""
        place = self.layout.cells[mixer]
        size = (place.stop - place.start) * self._cells.shape[1]
        return self._cells.new_zeros(count, size)

    def write(self, mixer: int, rows: torch.Tensor, memory: torch.Tensor) -> None:
        """Store a mixer's states."""
        cells = rows[:, self.layout.cells[mixer]].flatten()
        self._cells.index_copy_(0, cells, memory.view(len(cells), -1))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of ``length`` tokens, all of them after a state or all at their first token.

    ``tokens`` are their places in the flat tokens, one row after another (None: all tokens of the
    pass in their order), ``cells`` those of their states.
    """

    length: int
    has_states: bool
    tokens: torch.Tensor | None
    cells: torch.Tensor


class PassStates:
    """The states of the rows of one pass."""

    def __init__(self, pool: StatePool, rows: Sequence[Row]) -> None:
        self._pool = pool
        kinds = dict.fromkeys((row.length, row.start > 0) for row in rows)
        self._batches = [
            self._batch(
                [row for row in rows if (row.length, row.start > 0) == kind], kind, len(kinds)
            )
            for kind in kinds
        ]

    def _batch(self, rows: list[Row], kind: tuple[int, bool], num_batches: int) -> _Batch:
        offsets = np.array([row.offset for row in rows])
        tokens = (offsets[:, None] + np.arange(kind[0])).reshape(-1)
        cells = self._pool.rows_of([row.side_blocks for row in rows])
        is_all = num_batches == 1  # rows lie in the order of their offsets
        return _Batch(*kind, None if is_all else on_device(tokens, cells.device), cells)

    def run(self, number: int, mixer: Mixer, hidden: torch.Tensor) -> Any:
        """Run mixer ``number`` over ``hidden`` [1, num_tokens, width], and keep the states that it
        leaves. Returns what it returns for a batch, with the hidden states of all tokens."""
        results = [self._run_batch(batch, number, mixer, hidden[0]) for batch in self._batches]
        (first, *_), (output, *_) = zip(*results, strict=True)
        if self._batches[0].tokens is None:
            flat = output[None]
        else:
            flat = hidden.new_empty(1, hidden.shape[1], output.shape[1], dtype=output.dtype)
            for batch, (_, part) in zip(self._batches, results, strict=True):
                assert batch.tokens is not None
                flat[0].index_copy_(0, batch.tokens, part)
        return (flat, *first[1:]) if isinstance(first, tuple) else flat

    def _run_batch(
        self, batch: _Batch, number: int, mixer: Mixer, hidden: torch.Tensor
    ) -> tuple[Any, torch.Tensor]:
        """What the mixer returned at last, and hidden states [num_tokens of the batch, width]."""
        pool, state = self._pool, self._pool.layout.mixers[number]
        tokens = hidden if batch.tokens is None else hidden.index_select(0, batch.tokens)
        tokens = tokens.view(-1, batch.length, hidden.shape[1])
        cache = MixerCache()
        if batch.has_states:
            memory = pool.read(number, batch.cells)
            views = pool.layout.tensors(number, memory)
            cache.load(state.pieces, views)
        else:
            memory = pool.zeros(number, len(batch.cells))
            views = pool.layout.tensors(number, memory)
        inputs = [tokens] if state.continues or not batch.has_states else one_by_one(tokens)
        parts = [mixer(part, cache) for part in inputs]
        left = cache.states()
        for piece, view in zip(state.pieces, views, strict=True):
            new = left[piece.kind, piece.index]
            if new.data_ptr() != view.data_ptr():
                view.copy_(new)
        pool.write(number, batch.cells, memory)
        output = torch.cat([output_of(part) for part in parts], dim=1)
        return parts[-1], output.reshape(-1, output.shape[2])
