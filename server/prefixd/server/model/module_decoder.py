"""The unmodified transformers model as a decoder: one flat row through our attention."""

from typing import Any

import numpy as np
import torch

from prefixd.server.model.attention import PagedBatch, StepAttention
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import NO_STEP, StepSizes
from prefixd.server.model.decoder import Logits
from prefixd.server.model.gathered import GatheredAttention
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.torch_decoder import TorchDecoder


class ModuleDecoder(TorchDecoder):
    """Runs any model that can be served, on any device."""

    name = "module"

    def __init__(
        self, base: LoadedBase, *, num_blocks: int, block_size: int, sizes: StepSizes = NO_STEP
    ) -> None:
        """``num_blocks`` counts the null block."""
        super().__init__(base, num_blocks=num_blocks, block_size=block_size, sizes=sizes)
        self.layers_seen = 0
        self._embed: Any = base.module.get_input_embeddings()
        self._num_ids = base.num_embeddings

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass; ``layers_seen`` is then the number of layers that ran our attention."""
        device = self.base.device
        self.buffers.fill(batch)
        paged = PagedBatch(
            attention=self._attention(batch),
            shape=self.base.shape,
            context=self.base.context,
        )
        positions = self.buffers.positions[: len(batch.token_ids)].astype(np.int64)
        output = self.base.module(
            inputs_embeds=self._embeddings(batch)[None],
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
            logits_to_keep=torch.tensor(batch.outputs, dtype=torch.long, device=device),
            paged_batch=paged,
        )
        self.layers_seen = paged.layers_seen
        # An id without an embedding could be sampled, but not be fed in afterwards.
        return Logits(output.logits[0, :, : self._num_ids])

    def _attention(self, batch: FlatBatch) -> StepAttention:
        """Attention of the pass that the buffers hold."""
        return GatheredAttention(self.cache, self.buffers, batch.rows)

    def _embeddings(self, batch: FlatBatch) -> torch.Tensor:
        """Input embeddings [num_tokens, embedding_width]: looked up, or those of a soft prompt."""
        looked_up = self._embed(torch.tensor(batch.token_ids, device=self.base.device))
        embeddings: torch.Tensor = looked_up.to(self.base.dtype)
        for offset, values in batch.inputs:
            embeddings[offset : offset + len(values)] = values.to(self.base.device)
        return embeddings
