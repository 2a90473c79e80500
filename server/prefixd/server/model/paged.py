"""The decoder of a GPU: lean layers whose attention, norms and gates are kernels of ours.

A dense layer is five kernels and four matrix products, with the weights of queries, keys and values
merged, and those of gate and up. Nothing in a step waits for the device, and no shape depends on
data, so a decode step can be captured into a graph (``graphs.py``). The kernels have references on
a CPU, which tests use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import NO_STEP, StepSizes, StepTensors
from prefixd.server.model.decoder import Logits
from prefixd.server.model.exact import NotExact, require_plain
from prefixd.server.model.gated import GatedAttention
from prefixd.server.model.graphs import DecodeGraphs, Graph
from prefixd.server.model.kernels import (
    add_rms_norm,
    attend,
    require_supported,
    rotate_and_write,
)
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.paged_mlp import (
    PagedDense,
    PagedExperts,
    paged_mlp,
    product,
    require_grouped_products,
)
from prefixd.server.model.parts import Layer, Linear, Parts
from prefixd.server.model.products import merged
from prefixd.server.model.torch_decoder import TorchDecoder


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One layer. Norms are [width], ``q_norm`` and ``k_norm`` [head_dim] or None."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Linear
    o: Linear
    mlp: PagedDense | PagedExperts


@dataclass(frozen=True, slots=True)
class PagedWeights:
    """A model. ``embedding`` is [num_embeddings, width]; ``cosine`` and ``sine`` [context,
    head_dim / 2] are float32."""

    embedding: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    layers: tuple[PagedLayer, ...]
    final_norm: torch.Tensor
    head: Linear
    norm_eps: float
    attention_scale: float


def hidden_states(
    weights: PagedWeights,
    cache: KVCache,
    step: StepTensors,
    embeddings: torch.Tensor,
    gated: GatedAttention | None = None,
) -> torch.Tensor:
    """Write the KV of a step and return what the head reads, [outputs, width]. ``embeddings`` is
    [num_tokens, width]; ``gated`` is what gated prefixes add."""
    eps, layers, head_dim = weights.norm_eps, weights.layers, cache.pool.shape[-1]
    residual = embeddings
    normed = functional.rms_norm(embeddings, embeddings.shape[1:], layers[0].input_norm, eps)
    next_norms = [*(layer.input_norm for layer in layers[1:]), weights.final_norm]
    for number, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
        kv, num_tokens = cache.layer(number), len(normed)
        queries = rotate_and_write(
            kv,
            product(normed, layer.qkv).view(num_tokens, -1, head_dim),
            step.positions,
            step.slots,
            cosine=weights.cosine,
            sine=weights.sine,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=eps,
        )
        if number == len(layers) - 1 and not len(step.outputs):
            return normed[:0]  # only the KV is wanted, and experts need at least one row
        attended = attend_step(queries, kv, step, weights.attention_scale)
        if gated is not None:
            gated.add(number, queries.view(num_tokens, -1, head_dim), attended)
        attended = attended.view(num_tokens, -1)
        if number == len(layers) - 1:
            attended = attended.index_select(0, step.outputs)
            residual = residual.index_select(0, step.outputs)
        normed, residual = add_rms_norm(product(attended, layer.o), residual, layer.post_norm, eps)
        normed, residual = add_rms_norm(layer.mlp(normed), residual, next_norm, eps)
    return normed


class PagedDecoder(TorchDecoder):
    """Runs a model of an exact family. The weights are taken from the module, which cannot be run
    afterwards."""

    name = "paged"

    @torch.inference_mode()
    def __init__(
        self, parts: Parts, *, num_blocks: int, block_size: int, sizes: StepSizes = NO_STEP
    ) -> None:
        """``num_blocks`` counts the null block. Raises NotExact."""
        base = parts.base
        require_kernels(base)
        if parts.has_experts:
            require_grouped_products(base)
        super().__init__(base, num_blocks=num_blocks, block_size=block_size, sizes=sizes)
        self.weights = PagedWeights(
            embedding=parts.embedding,
            cosine=parts.cosine.to(base.device),
            sine=parts.sine.to(base.device),
            layers=tuple(map(_paged_layer, parts.take_layers())),
            final_norm=parts.final_norm,
            head=parts.head,
            norm_eps=parts.norm_eps,
            attention_scale=parts.attention_scale,
        )
        parts.remove_ends()
        self._graphs: DecodeGraphs | None = None

    def zero(self, blocks: Sequence[int]) -> None:
        """Nothing: the kernels read no position that was not written."""

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass: write the KV of its tokens and return the logits of its outputs."""
        hidden = None if self._graphs is None else self._graphs.run(batch)
        if hidden is None:
            self.buffers.fill(batch)
            self.buffers.send()
            step = self.buffers.tensors()
            embeddings = self._embeddings(step)
            for offset, values in batch.inputs:
                given = values.to(self.device, non_blocking=True)
                embeddings[offset : offset + len(values)] = given
            gated = self.gated(batch.rows)
            hidden = hidden_states(self.weights, self.cache, step, embeddings, gated)
        # An id without an embedding could be sampled, but not be fed in afterwards.
        logits = product(hidden, self.weights.head)
        return Logits(logits[: len(batch.outputs), : self.base.num_embeddings])

    @torch.inference_mode()
    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a Decoder."""
        width = self.base.shape.num_kv_heads * self.base.shape.head_dim
        given = inputs.to(self.device, non_blocking=True)
        keys_values = product(given, self.weights.layers[layer].qkv)[:, -2 * width :]
        return keys_values[:, :width], keys_values[:, width:]

    @torch.inference_mode()
    def capture(self, max_rows: int, *, new_graph: Callable[[], Graph]) -> None:
        """Capture decode steps of up to ``max_rows`` rows; later ones replay them."""
        graphs = DecodeGraphs(
            self.buffers, self._decode, max_rows=max_rows, max_length=self.base.context
        )
        graphs.capture(new_graph)
        self._graphs = graphs

    def _decode(self, step: StepTensors) -> torch.Tensor:
        return hidden_states(self.weights, self.cache, step, self._embeddings(step))

    def _embeddings(self, step: StepTensors) -> torch.Tensor:
        return functional.embedding(step.token_ids(), self.weights.embedding)


def require_kernels(base: LoadedBase) -> None:
    """Raise NotExact for attention that the kernels do not compute."""
    require_plain(base)
    shape = base.shape
    try:
        require_supported(
            head_dim=shape.head_dim,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            dtype=base.dtype,
        )
    except ValueError as reason:
        raise NotExact(f"{base.name} has {reason}") from reason


def attend_step(
    queries: torch.Tensor, kv: torch.Tensor, step: StepTensors, scale: float
) -> torch.Tensor:
    """Attention of a step over one layer's part of the pool; returns the shape of ``queries``."""
    return attend(
        queries,
        kv,
        step.rows,
        scale=scale,
        max_queries=step.max_queries,
        max_length=step.max_length,
    )


def _paged_layer(layer: Layer) -> PagedLayer:
    return PagedLayer(
        input_norm=layer.input_norm,
        post_norm=layer.post_norm,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        qkv=merged([layer.q, layer.k, layer.v]),
        o=layer.o,
        mlp=paged_mlp(layer.mlp),
    )
