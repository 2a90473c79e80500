"""An encoder-decoder of transformers as a decoder of steps: encoder passes, then the decoder.

What the pool holds of a request, all in blocks of one size::

    block table    [ KV prefix, shared | start, output ... ]    self-attention of the decoder
    side blocks    [ soft prompt, input                    ]    cross-attention, written once
    gated          [ soft prompt, shared                   ]    embeddings, read by the encoder

A soft prompt stands in front of the encoder's input, and all of the input sees it and is seen by
it: it compiles to nothing. Its embeddings are stored as they are, in as many positions as it has
virtual tokens: one position of the pool has room for an embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from prefixd.server.engine.step import BlockCopy
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.decoder import Logits
from prefixd.server.model.encoder_decoder.attention import (
    DecoderPass,
    EncoderPass,
    Span,
    source_slots,
    write,
)
from prefixd.server.model.encoder_decoder.facts import EncoderDecoder
from prefixd.server.model.encoder_decoder.hooks import Pass
from prefixd.server.model.encoder_decoder.layout import unpacked
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.rows import Row
from prefixd.server.model.threads import use_threads
from prefixd.server.model.transfer import on_device


class PairDecoder:
    """Runs T5, BART and models built like them, on any device."""

    name = "module"
    state_blocks = 0

    def __init__(self, base: LoadedBase, *, num_blocks: int, block_size: int) -> None:
        """``num_blocks`` counts the null block."""
        assert base.pair is not None
        self.base = base
        self.num_layers = base.shape.num_layers
        self.block_size = block_size
        self.device = base.device
        self.cache = KVCache(
            base.layers,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=base.dtype,
            device=base.device,
        )
        self._pair: EncoderDecoder = base.pair
        self._embed: Any = base.module.get_input_embeddings()

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Logits:
        """Encode the inputs that are new, then run the decoder."""
        self._encode([row for row in batch.rows if row.source and row.source.token_ids])
        own = [Span(row.offset, row.length, row.start, row.block_table) for row in batch.rows]
        source = [_source(row) for row in batch.rows]
        running = DecoderPass(own, source, cache=self.cache, outputs=batch.outputs)
        embeddings = self._embedded(batch.token_ids)
        nothing = embeddings.new_zeros(1, 1, embeddings.shape[-1])  # read by no layer
        output = self._run(
            running,
            self.base.module,
            encoder_outputs=BaseModelOutput(last_hidden_state=nothing),
            decoder_inputs_embeds=embeddings[None],
        )
        return Logits(output.logits[0, :, : self.base.num_embeddings])

    def _encode(self, rows: Sequence[Row]) -> None:
        """Run the encoder over the inputs of rows, each by itself, and store the keys and values of
        cross-attention."""
        if not rows:
            return
        inputs = [self._input(row) for row in rows]
        lengths = [len(states) for states in inputs]
        running = EncoderPass(lengths, self.device)
        encoder = self.base.module.get_encoder()
        output = self._run(running, encoder, inputs_embeds=torch.cat(inputs)[None])
        states = output.last_hidden_state[0]
        slots = source_slots([row.side_blocks for row in rows], lengths, self.cache)
        for attention in self._pair.hooks.cross:
            write(self.cache, attention.layer, slots, attention.keys_and_values(states))

    def _input(self, row: Row) -> torch.Tensor:
        """The input embeddings [n, width] of a row's encoder: soft prompt and tokens."""
        assert row.source is not None
        embedded = self._embedded(row.source.token_ids)
        if row.gated is None:
            return embedded
        kv = self.cache.read_table(row.gated.block_table, row.gated.num_tokens)
        soft = unpacked(kv, width=embedded.shape[-1])
        return torch.cat([soft.to(self.device), embedded])

    def _embedded(self, token_ids: Sequence[int]) -> torch.Tensor:
        embeddings: torch.Tensor = self._embed(on_device(token_ids, self.device))
        return embeddings.to(self.base.dtype)

    def _run(self, running: Pass, module: Any, **inputs: Any) -> Any:
        hooks = self._pair.hooks
        hooks.current = running
        try:
            return module(**inputs, use_cache=False)
        finally:
            hooks.current = None

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

    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adaption prompts, which need this, are refused on an encoder-decoder."""
        raise AssertionError(f"an adaption prompt was compiled for layer {layer} of {len(inputs)}")

    def set_threads(self, threads: int) -> None:
        """Let the passes of the calling thread use this many threads."""
        use_threads(threads)

    def thread_use(self) -> None:
        """Every pass uses all threads."""


def _source(row: Row) -> Span:
    """What a row's cross-attention sees: zeros alone without an input, as a probe of the bare
    base."""
    if row.source is None:
        return Span(row.offset, row.length, row.start, row.block_table[:1], visible=1)
    return Span(row.offset, row.length, row.start, row.side_blocks, visible=row.source.num_tokens)
