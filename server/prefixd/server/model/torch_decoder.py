"""What decoders in torch have in common: KV pool, buffers of a step, and torch's threads."""

from collections.abc import Sequence

import torch

from prefixd.server.engine.step import BlockCopy
from prefixd.server.model.buffers import NO_STEP, StepBuffers, StepSizes
from prefixd.server.model.gated import GatedAttention
from prefixd.server.model.kernels import members_per_tile
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.rows import Row
from prefixd.server.model.threads import use_threads


class TorchDecoder:
    """The part of a Decoder that does not compute: ``cache`` is the pool and ``buffers`` hold the
    last step, on the base's device."""

    def __init__(
        self, base: LoadedBase, *, num_blocks: int, block_size: int, sizes: StepSizes = NO_STEP
    ) -> None:
        """``num_blocks`` counts the null block."""
        self.base = base
        self.block_size = block_size
        self.device = base.device
        self.num_layers = base.shape.num_layers
        self.cache = KVCache(
            base.layers,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=base.dtype,
            device=base.device,
        )
        layout = self.cache.state_layout
        self.state_blocks = 0 if layout is None else layout.num_blocks
        self.buffers = StepBuffers(
            block_size=block_size,
            scratch_slot=self.cache.scratch_slot,
            device=base.device,
            tile_rows=max(1, members_per_tile(base.shape.num_heads // base.shape.num_kv_heads)),
            sizes=sizes,
            max_blocks=min(num_blocks, -(-base.context // block_size)),
        )

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them: a mask does not stop NaN from spreading."""
        self.cache.zero(blocks)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks."""
        self.cache.copy(copies)

    def read_kv(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table, in host memory:
        [2 * num_layers, num_tokens, num_kv_heads * head_dim]."""
        return self.cache.read_table(block_table, num_tokens)

    def write_kv(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` [2 * num_layers, n, num_kv_heads * head_dim] from position ``start`` on."""
        self.cache.write_table(block_table, start, kv)

    def gated(self, rows: Sequence[Row]) -> GatedAttention | None:
        """What gated prefixes add in a pass of ``rows``; None where there are none."""
        if all(row.gated is None for row in rows):
            return None
        return GatedAttention(self.cache, rows, scale=self.base.shape.head_dim**-0.5)

    def set_threads(self, threads: int) -> None:
        """Let the passes of the calling thread use this many threads."""
        use_threads(threads)

    def thread_use(self) -> None:
        """Every pass uses all threads."""
