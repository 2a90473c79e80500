"""The KV pool: two tensors for each layer, addressed by slot."""

from collections.abc import Sequence

import torch

from prefixd.server.engine.step import BlockCopy
from prefixd.server.model.architecture import Shape


def slots_of(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Slots of positions ``start .. end`` under a block table."""
    return [
        block_table[position // block_size] * block_size + position % block_size
        for position in range(start, end)
    ]


class KVCache:
    """Keys and values of all blocks. Slot ``block * block_size + offset`` holds one position.

    ``keys[layer]`` and ``values[layer]`` are [num_blocks * block_size, num_kv_heads * head_dim].
    Keys are stored after the rotary embedding.
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
        self.block_size = block_size
        self.shape = shape
        size = (num_blocks * block_size, shape.num_kv_heads * shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them: a mask does not stop NaN from spreading."""
        if blocks:
            index = torch.tensor(blocks, device=self.keys[0].device)
            for pool in (*self.keys, *self.values):
                self._by_block(pool).index_fill_(0, index, 0)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy full blocks: each sequence gets its own copy of a prefix's partial last block."""
        if copies:
            device = self.keys[0].device
            source = torch.tensor([copy.source for copy in copies], device=device)
            target = torch.tensor([copy.target for copy in copies], device=device)
            for pool in (*self.keys, *self.values):
                blocks = self._by_block(pool)
                blocks.index_copy_(0, target, blocks.index_select(0, source))

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values, each [n, num_kv_heads * head_dim], at ``slots`` [n]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """KV at ``slots`` [n] as [2 * num_layers, n, num_kv_heads * head_dim]: keys of layer i at
        2i and values at 2i + 1."""
        pools = (pool for pair in zip(self.keys, self.values, strict=True) for pool in pair)
        return torch.stack([pool.index_select(0, slots) for pool in pools])

    def read_table(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table, in host memory, as of ``read``."""
        return self.read(self._slots(block_table, 0, num_tokens)).cpu()

    def write_table(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` [2 * num_layers, n, num_kv_heads * head_dim] from position ``start`` on."""
        slots = self._slots(block_table, start, start + kv.shape[1])
        kv = kv.to(slots.device)
        for layer in range(self.shape.num_layers):
            self.write(layer, slots, kv[2 * layer], kv[2 * layer + 1])

    def by_head(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a layer's pools as [slots * num_kv_heads, head_dim]."""
        width = self.shape.head_dim
        return self.keys[layer].view(-1, width), self.values[layer].view(-1, width)

    def _slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        slots = slots_of(block_table, start, end, self.block_size)
        return torch.tensor(slots, device=self.keys[0].device)

    def _by_block(self, pool: torch.Tensor) -> torch.Tensor:
        return pool.view(-1, self.block_size, pool.shape[1])

    @property
    def num_bytes(self) -> int:
        """Memory of the pool in bytes."""
        return sum(pool.numel() * pool.element_size() for pool in (*self.keys, *self.values))
