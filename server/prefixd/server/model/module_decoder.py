"""The transformers model as a decoder: one flat row through our attention."""

from typing import Any

import torch

from prefixd.server.model.attention import Pass, StepAttention, running
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import NO_STEP, StepSizes
from prefixd.server.model.decoder import Logits
from prefixd.server.model.gated import WithGated
from prefixd.server.model.gated_places import add_after_projections, place_of, project_module
from prefixd.server.model.gathered import GatheredAttention
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.per_layer import PerLayerInputs, word_scale
from prefixd.server.model.state_pool import PassStates
from prefixd.server.model.step_cache import StepCache, cache_argument, cache_of
from prefixd.server.model.torch_decoder import TorchDecoder
from prefixd.server.model.transfer import on_device


class ModuleDecoder(TorchDecoder):
    """Runs any model that can be served, on any device."""

    name = "module"

    def __init__(
        self, base: LoadedBase, *, num_blocks: int, block_size: int, sizes: StepSizes = NO_STEP
    ) -> None:
        """``num_blocks`` counts the null block."""
        super().__init__(base, num_blocks=num_blocks, block_size=block_size, sizes=sizes)
        self._embed: Any = base.module.get_input_embeddings()
        self._word_scale = word_scale(base.module)
        self._per_layer = PerLayerInputs(base.module)
        self._num_ids = base.num_embeddings
        place = place_of(base.module)
        self._adds_after = place is not None and place.after_projection
        add_after_projections(base.module, base.shape)
        self._cache_type = cache_of(base.module, StepCache)
        self._cache_argument = cache_argument(base.module)

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass: write the KV of its tokens and return the logits of its outputs."""
        self.buffers.fill(batch)
        attention = self._attention(batch)
        gated = self.gated(batch.rows)
        if gated is not None:
            attention = WithGated(attention, gated, after=self._adds_after)
        token_ids, positions, outputs = self._flat(batch)
        given = [slice(offset, offset + len(values)) for offset, values in batch.inputs]
        cache = self._cache_type(attention, self.base.layers, positions)
        pool = self.cache.states
        states = None if pool is None else PassStates(pool, batch.rows)
        with running(Pass(attention, self.base.layers, cache, batch.rows, states)):
            output = self.base.module(
                inputs_embeds=self._embeddings(token_ids, batch)[None],
                position_ids=positions[None],
                use_cache=True,
                logits_to_keep=outputs,
                **{self._cache_argument: cache},
                **self._per_layer(token_ids, given),
            )
        # An id without an embedding could be sampled, but not be fed in afterwards.
        return Logits(output.logits[0, :, : self._num_ids])

    @torch.inference_mode()
    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a Decoder, for a model that takes gated prefixes."""
        return project_module(self.base.module, layer, inputs.to(self.device))

    def _attention(self, batch: FlatBatch) -> StepAttention:
        """Attention of the pass that the buffers hold."""
        return GatheredAttention(self.cache, self.buffers, batch.rows)

    def _flat(self, batch: FlatBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and outputs of the pass that the buffers hold, int64."""
        positions = self.buffers.positions[: len(batch.token_ids)]
        return (
            on_device(batch.token_ids, self.device),
            on_device(positions, self.device),
            on_device(batch.outputs, self.device),
        )

    def _embeddings(self, token_ids: torch.Tensor, batch: FlatBatch) -> torch.Tensor:
        """Input embeddings [num_tokens, embedding_width]: looked up, or those of a soft prompt."""
        looked_up = self._embed(token_ids)
        if self._word_scale != 1.0:
            looked_up = looked_up * self._word_scale
        embeddings: torch.Tensor = looked_up.to(self.base.dtype)
        for offset, values in batch.inputs:
            embeddings[offset : offset + len(values)] = values.to(self.base.device)
        return embeddings
