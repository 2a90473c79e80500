"""The KV pool: one tensor for all that has one shape, addressed by slot.

::

    planes of one tensor    | keys 0 | values 0 | keys 1 | values 1 | ...  one shape: most models
    planes of two tensors   | latents 0 | latents 1 | ...                  DeepSeek: two widths
                            | keys 0    | keys 1    | ...
"""

from collections import Counter
from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from prefixd.server.engine.step import BlockCopy
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.layers import LayerCache, Layers
from prefixd.server.model.state_pool import StatePool
from prefixd.server.model.states import ALIGNED, WITHOUT_KV, StateLayout
from prefixd.server.model.transfer import on_device

_LINE = 64
"""Bytes of a cache line."""

_STATES = 0, 0
"""In place of the shape of a plane, where no layer has KV."""


class KVCache:
    """Keys and values of all blocks. Slot ``block * block_size + offset`` holds one position.

    A plane holds the keys or the values of one layer: [num_blocks + 1, block_size, heads, width],
    and planes of equal shape are one tensor. Keys are stored as the model caches them: after the
    rotary embedding. The last block is scratch: padding of a pass writes there and no block table
    holds it, since the null block must stay zero.

    KV outside of the pool is [2 * num_layers, n, heads * width] for n positions, keys of layer i at
    2i and values at 2i + 1, where all planes have one shape, and else [1, n, all widths] in that
    order.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``num_blocks`` counts the null block, and not the scratch block."""
        self.block_size = block_size
        self.scratch_slot = num_blocks * block_size
        self.device = device
        self.layers = layers
        self._one_shape = layers.one_shape
        counts: dict[tuple[int, int], int] = {}  # planes of each shape so far
        places: list[tuple[tuple[int, int], int]] = []
        for layer in layers.caches.values():
            for shape in _plane_shapes(layer):
                places.append((shape, counts.get(shape, 0)))
                counts[shape] = counts.get(shape, 0) + 1
        tensors = {
            shape: torch.zeros(
                (count, num_blocks + 1, block_size, *shape), dtype=dtype, device=device
            )
            for shape, count in counts.items()
        }
        self.state_layout = state_layout(layers, block_size=block_size, dtype=dtype)
        if self.state_layout is not None and not tensors:
            cell = self.state_layout.cell_bytes
            tensors[_STATES] = torch.zeros(
                (1, num_blocks + 1, 1, 1, cell), dtype=torch.uint8, device=device
            )
        self.tensors = tuple(tensors.values())
        self._by_block = [tensor.view(len(tensor), num_blocks + 1, -1) for tensor in self.tensors]
        self._by_slot = [
            tensor.view(len(tensor), -1, tensor.shape[3] * tensor.shape[4])
            for tensor in self.tensors
        ]
        self.states = None
        if self.state_layout is not None:
            shape = max(counts, key=lambda each: counts[each] * prod(each), default=_STATES)
            self.states = StatePool(self.state_layout, tensors[shape])
        planes = [tensors[shape][place] for shape, place in places]
        # Of each layer, keys and values: [slots, heads * width] and [slots * heads, width].
        self._rows, self._by_head = {}, {}
        for index, number in enumerate(layers.caches):
            keys, values = planes[2 * index : 2 * index + 2]
            self._rows[number] = _rows(keys), _rows(values)
            self._by_head[number] = _by_head(keys), _by_head(values)
        self._layers: list[torch.Tensor] = list(self.pool) if self._one_shape is not None else []

    @property
    def pool(self) -> torch.Tensor:
        """All of it where there is one shape:
        [num_layers, 2, num_blocks + 1, block_size, heads, width]."""
        (tensor,) = self.tensors
        return tensor.view(-1, 2, *tensor.shape[1:])

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them: a mask does not stop NaN from spreading."""
        if blocks:
            index = self._index(blocks)
            for tensor in self._by_block:
                tensor.index_fill_(1, index, 0)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy full blocks: each sequence gets its own copy of a prefix's partial last block."""
        if copies:
            source = self._index([copy.source for copy in copies])
            target = self._index([copy.target for copy in copies])
            for tensor in self._by_block:
                tensor.index_copy_(1, target, tensor.index_select(1, source))

    def layer(self, layer: int) -> torch.Tensor:
        """A layer's part of a pool of one shape: [2, num_blocks + 1, block_size, heads, width]."""
        return self._layers[layer]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values, each [n, heads * width], at ``slots`` [n] (int64)."""
        key_rows, value_rows = self._rows[layer]
        key_rows.index_copy_(0, slots, keys)
        value_rows.index_copy_(0, slots, values)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a layer's keys and values as [slots, heads * width]."""
        return self._rows[layer]

    def by_head(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a layer's keys and values as [slots * heads, width]."""
        return self._by_head[layer]

    def read_table(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table, in host memory."""
        slots = self._slots(block_table, 0, num_tokens)
        if not self._rows:
            return torch.empty(0, num_tokens, 0)
        if self._one_shape is not None:
            return self._by_slot[0].index_select(1, slots).cpu()
        planes = [plane.index_select(0, slots) for rows in self._rows.values() for plane in rows]
        return torch.cat(planes, -1)[None].cpu()

    def write_table(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` of n positions from position ``start`` on."""
        if not self._rows:
            return
        slots = self._slots(block_table, start, start + kv.shape[1])
        kv = kv.to(slots.device)
        if self._one_shape is not None:
            self._by_slot[0].index_copy_(1, slots, kv)
            return
        planes = [plane for rows in self._rows.values() for plane in rows]
        parts = torch.split(kv[0], [plane.shape[1] for plane in planes], dim=1)
        for plane, part in zip(planes, parts, strict=True):
            plane.index_copy_(0, slots, part)

    def read_blocks(self, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Whole blocks in host memory, for ``write_blocks``."""
        index = self._index(blocks)
        return [tensor.index_select(1, index).cpu() for tensor in self._by_block]

    def write_blocks(self, blocks: Sequence[int], content: Sequence[torch.Tensor]) -> None:
        """Store whole blocks."""
        index = self._index(blocks)
        for tensor, values in zip(self._by_block, content, strict=True):
            tensor.index_copy_(1, index, values.to(self.device))

    def largest(self) -> float:
        """The largest absolute value; 0 where blocks may hold states, which are bytes."""
        if self.states is not None:
            return 0.0
        return max(float(torch.linalg.vector_norm(each, torch.inf)) for each in self.tensors)

    def _slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slots of positions ``start .. end`` under a block table."""
        positions = np.arange(start, end)
        blocks = np.asarray(block_table)[positions // self.block_size]
        return self._index(blocks * self.block_size + positions % self.block_size)

    def _index(self, values: "Sequence[int] | np.ndarray") -> torch.Tensor:
        return on_device(values, self.device)


def state_layout(layers: Layers, *, block_size: int, dtype: torch.dtype) -> StateLayout | None:
    """Where the states of a sequence lie in the planes of one shape, that which has the most
    memory; None: no layer has a state.

    Raises UnsupportedModel for blocks that cannot hold numbers of 8 bytes.
    """
    if not layers.states:
        return None
    counts = Counter(shape for layer in layers.caches.values() for shape in _plane_shapes(layer))
    if not counts:
        size = sum(mixer.num_bytes(dtype) for mixer in layers.states)
        cell = -(-size // (_LINE * WITHOUT_KV)) * _LINE
        return StateLayout(layers.states, dtype, cell, cells_per_block=1)
    shape, planes = max(counts.items(), key=lambda each: each[1] * prod(each[0]))
    cell = block_size * prod(shape) * dtype.itemsize
    if cell % ALIGNED:
        raise UnsupportedModel(
            f"a block of {block_size} positions has {cell} bytes of keys in a layer, where states "
            f"are kept; expected a multiple of {ALIGNED}"
        )
    return StateLayout(layers.states, dtype, cell, planes)


def _plane_shapes(layer: LayerCache) -> tuple[tuple[int, int], tuple[int, int]]:
    return (layer.num_heads, layer.key_width), (layer.num_heads, layer.value_width)


def _rows(plane: torch.Tensor) -> torch.Tensor:
    return plane.view(-1, plane.shape[2] * plane.shape[3])


def _by_head(plane: torch.Tensor) -> torch.Tensor:
    return plane.view(-1, plane.shape[3])
