"""The decoder of one rank: the module, with the heads of this rank in its KV pool."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from prefixd.server.model.heads import local_shape
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.module_decoder import ModuleDecoder


class ParallelDecoder(ModuleDecoder):
    """Runs a sharded module. KV outside of the decoder has all heads, as with one process.

    All ranks call the same methods in the same order: ``forward`` and ``read_kv`` are collective.
    """

    def __init__(self, base: LoadedBase, *, num_blocks: int, block_size: int) -> None:
        """``base`` has the shape of the whole model."""
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(local_base(base), num_blocks=num_blocks, block_size=block_size)

    def read_kv(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """As of a Decoder: gathered from all ranks, in host memory."""
        own = super().read_kv(block_table, num_tokens)  # [2 * num_layers, num_tokens, own heads]
        parts = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=-1)

    def write_kv(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """As of a Decoder: this rank stores its heads of ``kv``."""
        width = kv.shape[-1] // self._ranks
        own = kv[..., self._rank * width : (self._rank + 1) * width]
        super().write_kv(block_table, start, own)


def local_base(base: LoadedBase) -> LoadedBase:
    """``base`` as its attention on this rank is: with a part of the heads."""
    return replace(base, shape=local_shape(base.shape, ranks=dist.get_world_size()))
