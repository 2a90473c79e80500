"""The states of layers that have one instead of KV: what a layer keeps, and where in the pool.

Linear attention, state-space layers and short convolutions keep tensors of one size, however many
tokens came before. Those of a sequence lie in its side blocks, as bytes::

    planes of the pool's largest tensor    side block 5     side block 9
    keys of layer 0                        | mixer 0  |     | mixer 1  |
    values of layer 0                      | mixer 0  |     | (unused) |
    keys of layer 1                        | mixer 1  |     | (unused) |

A cell is one block in one plane. The state of a mixer takes consecutive cells of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

ALIGNED = 8
"""Bytes: tensors of a state begin at multiples of it."""

WITHOUT_KV = 16
"""Blocks that a state takes where no layer has KV: blocks have the size that this needs. The blocks
of a block table hold nothing there, so that many is better for memory, and few for long texts."""


@dataclass(frozen=True, slots=True)
class StatePiece:
    """One tensor [*shape] of a mixer's state of a sequence: ``index`` of its ``kind`` (``conv``,
    ``recurrent`` or ``linear``). ``dtype`` None: that in which the model runs."""

    kind: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes in a model that runs in ``dtype``, aligned."""
        size = prod(self.shape) * (self.dtype or dtype).itemsize
        return -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True, slots=True)
class MixerState:
    """The state of one module, of class ``kind``. ``continues``: it takes several tokens after a
    state at a time; else it runs them one by one."""

    kind: str
    pieces: tuple[StatePiece, ...]
    continues: bool

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes in a model that runs in ``dtype``."""
        return sum(piece.num_bytes(dtype) for piece in self.pieces)


@dataclass(frozen=True)
class StateLayout:
    """Where the states of one sequence lie in its side blocks: ``cells_per_block`` planes, each of
    ``cell_bytes`` a block."""

    mixers: Sequence[MixerState]
    dtype: torch.dtype
    cell_bytes: int
    cells_per_block: int

    @cached_property
    def cells(self) -> list[slice]:
        """The cells of each mixer."""
        places: list[slice] = []
        end = 0
        for mixer in self.mixers:
            start, end = end, end + -(-mixer.num_bytes(self.dtype) // self.cell_bytes)
            places.append(slice(start, end))
        return places

    @cached_property
    def num_blocks(self) -> int:
        """Side blocks of a sequence."""
        num_cells: int = self.cells[-1].stop
        return -(-num_cells // self.cells_per_block)

    def rows(self, side_blocks: Sequence[Sequence[int]], *, blocks_per_plane: int) -> np.ndarray:
        """The cells [sequences, cells] of sequences with these side blocks, as rows of all planes
        one after another."""
        cells = np.arange(self.cells[-1].stop)
        block, plane = np.divmod(cells, self.cells_per_block)
        held = np.array([blocks[: self.num_blocks] for blocks in side_blocks], dtype=np.int64)
        rows: np.ndarray = plane * blocks_per_plane + held[:, block]
        return rows

    def tensors(self, mixer: int, memory: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of a mixer as views [R, *shape] of ``memory`` [R, bytes of its cells]."""
        views, start = [], 0
        for piece in self.mixers[mixer].pieces:
            dtype = piece.dtype or self.dtype
            count = prod(piece.shape) * dtype.itemsize
            part = memory[:, start : start + count].view(dtype)
            views.append(part.view(len(memory), *piece.shape))
            start += piece.num_bytes(self.dtype)
        return views
