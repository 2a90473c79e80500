"""The KV pool: one tensor for all layers, addressed by slot."""

from collections.abc import Sequence

import numpy as np
import torch

from prefixd.server.engine.step import BlockCopy
from prefixd.server.model.architecture import Shape
from prefixd.server.model.transfer import on_device


class KVCache:
    """Keys and values of all blocks. Slot ``block * block_size + offset`` holds one position.

    ``pool`` is [num_layers, 2, num_blocks + 1, block_size, num_kv_heads, head_dim], keys before
    values. Keys are stored after the rotary embedding. The last block is scratch: padding of a pass
    writes there and no block table holds it, since the null block must stay zero.

    All layers of a model that can be served have one shape of keys and values. A model whose layers
    differ would have a pool for each shape here, and a place in it for each layer.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``num_blocks`` counts the null block, and not the scratch block."""
        self.block_size = block_size
        self.shape = shape
        self.scratch_slot = num_blocks * block_size
        self.pool = torch.zeros(
            (shape.num_layers, 2, num_blocks + 1, block_size, shape.num_kv_heads, shape.head_dim),
            dtype=dtype,
            device=device,
        )
        self._layers = [self.pool[layer] for layer in range(shape.num_layers)]
        self._by_block = self.pool.view(2 * shape.num_layers, num_blocks + 1, -1)
        self._by_slot = self.pool.view(  # [2 * num_layers, slots, num_kv_heads * head_dim]
            2 * shape.num_layers, -1, shape.num_kv_heads * shape.head_dim
        )
        self._rows = [self._by_slot[row] for row in range(2 * shape.num_layers)]
        self._by_head = [  # keys and values of each layer, [slots * num_kv_heads, head_dim]
            (
                self._rows[2 * layer].view(-1, shape.head_dim),
                self._rows[2 * layer + 1].view(-1, shape.head_dim),
            )
            for layer in range(shape.num_layers)
        ]

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them: a mask does not stop NaN from spreading."""
        if blocks:
            self._by_block.index_fill_(1, self._index(blocks), 0)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy full blocks: each sequence gets its own copy of a prefix's partial last block."""
        if copies:
            source = self._index([copy.source for copy in copies])
            target = self._index([copy.target for copy in copies])
            self._by_block.index_copy_(1, target, self._by_block.index_select(1, source))

    def layer(self, layer: int) -> torch.Tensor:
        """A layer's part of the pool: [2, num_blocks + 1, block_size, num_kv_heads, head_dim]."""
        return self._layers[layer]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values, each [n, num_kv_heads * head_dim], at ``slots`` [n] (int64)."""
        self._rows[2 * layer].index_copy_(0, slots, keys)
        self._rows[2 * layer + 1].index_copy_(0, slots, values)

    def read_table(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table, in host memory, as
        [2 * num_layers, num_tokens, num_kv_heads * head_dim]: keys of layer i at 2i and values at
        2i + 1."""
        return self._by_slot.index_select(1, self._slots(block_table, 0, num_tokens)).cpu()

    def write_table(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` [2 * num_layers, n, num_kv_heads * head_dim] from position ``start`` on."""
        slots = self._slots(block_table, start, start + kv.shape[1])
        self._by_slot.index_copy_(1, slots, kv.to(slots.device))

    def by_head(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a layer's keys and values as [slots * num_kv_heads, head_dim]."""
        return self._by_head[layer]

    def largest(self) -> float:
        """The largest absolute value."""
        return float(torch.linalg.vector_norm(self.pool, torch.inf))

    def _slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slots of positions ``start .. end`` under a block table."""
        positions = np.arange(start, end)
        blocks = np.asarray(block_table)[positions // self.block_size]
        return self._index(blocks * self.block_size + positions % self.block_size)

    def _index(self, values: "Sequence[int] | np.ndarray") -> torch.Tensor:
        return on_device(values, self.pool.device)
