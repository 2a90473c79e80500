"""The unmodified transformers model as a decoder: one flat row through our attention."""

from collections.abc import Sequence
from typing import Any

import torch

from prefixd.server.engine.step import BlockCopy
from prefixd.server.model.attention import PagedBatch
from prefixd.server.model.batch import FlatBatch, group_rows
from prefixd.server.model.decoder import Logits
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.threads import use_threads


class ModuleDecoder:
    """Runs any model that can be served, on any device."""

    name = "module"

    def __init__(self, base: LoadedBase, *, num_blocks: int, block_size: int) -> None:
        """``num_blocks`` counts the null block."""
        self.base = base
        self.block_size = block_size
        self.device = base.device
        self.layers_seen = 0
        self.cache = KVCache(
            base.shape,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=base.dtype,
            device=base.device,
        )
        self._embed: Any = base.module.get_input_embeddings()
        self._num_ids = base.num_embeddings

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass; ``layers_seen`` is then the number of layers that ran our attention."""
        device = self.base.device
        paged = PagedBatch(
            cache=self.cache,
            slots=torch.tensor(batch.slots(self.block_size), device=device),
            groups=group_rows(
                batch.rows,
                block_size=self.block_size,
                num_kv_heads=self.base.shape.num_kv_heads,
                device=device,
            ),
            context=self.base.context,
        )
        output = self.base.module(
            inputs_embeds=self._embeddings(batch)[None],
            position_ids=torch.tensor([batch.positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(batch.outputs, dtype=torch.long, device=device),
            paged_batch=paged,
        )
        self.layers_seen = paged.layers_seen
        # An id without an embedding could be sampled, but not be fed in afterwards.
        return Logits(output.logits[0, :, : self._num_ids])

    def _embeddings(self, batch: FlatBatch) -> torch.Tensor:
        """Input embeddings [num_tokens, embedding_width]: looked up, or those of a soft prompt."""
        looked_up = self._embed(torch.tensor(batch.token_ids, device=self.base.device))
        embeddings: torch.Tensor = looked_up.to(self.base.dtype)
        for offset, values in batch.inputs:
            embeddings[offset : offset + len(values)] = values.to(self.base.device)
        return embeddings

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them: a mask does not stop NaN from spreading."""
        self.cache.zero(blocks)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks."""
        self.cache.copy(copies)

    def read_kv(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table, in host memory."""
        return self.cache.read_table(block_table, num_tokens)

    def write_kv(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` from position ``start`` on."""
        self.cache.write_table(block_table, start, kv)

    def set_threads(self, threads: int) -> None:
        """Run passes on this many threads."""
        use_threads(threads)
