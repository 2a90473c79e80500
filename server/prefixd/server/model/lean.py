"""Lean layers in torch: exact families with merged and packed weights, on any device.

The module of transformers computes the same in more and smaller operations; on a CPU its matrix
products pack their weights in every call.
"""

import numpy as np
import torch
from torch.nn import functional

from prefixd.server.model.attention import Options, StepAttention
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.decoder import Logits
from prefixd.server.model.gated import WithGated
from prefixd.server.model.gathered import GatheredAttention
from prefixd.server.model.parts import Dense, Experts, Layer, Linear, Parts
from prefixd.server.model.products import Product, product_of
from prefixd.server.model.torch_decoder import TorchDecoder


class LeanDecoder(TorchDecoder):
    """Runs a model of an exact family. The weights are taken from the module, which cannot be run
    afterwards."""

    name = "torch"

    @torch.inference_mode()
    def __init__(self, parts: Parts, *, num_blocks: int, block_size: int) -> None:
        """``num_blocks`` counts the null block."""
        base = parts.base
        super().__init__(base, num_blocks=num_blocks, block_size=block_size)
        self._num_ids = base.num_embeddings
        self._eps = parts.norm_eps
        self._options = [
            Options(parts.attention_scale, layer.window, layer.chunk)
            for layer in base.layers.attention.values()
        ]
        # As transformers: computed in float32, rounded to the serving dtype.
        self._cosine, self._sine = (
            torch.cat([table, table], -1).to(base.device, base.dtype)
            for table in (parts.cosine, parts.sine)
        )
        self._embedding, self._final_norm = parts.embedding, parts.final_norm
        self._layers = [_LeanLayer(layer) for layer in parts.take_layers()]
        self._head = product_of([parts.head])
        parts.remove_ends()

    @torch.inference_mode()
    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass: write the KV of its tokens and return the logits of its outputs."""
        device = self.device
        self.buffers.fill(batch)
        hidden = self._embeddings(batch)
        positions = self.buffers.positions[: len(batch.token_ids)].astype(np.int64)
        index = torch.from_numpy(positions).to(device)
        rotary = self._cosine[index, None], self._sine[index, None]
        attention: StepAttention = GatheredAttention(self.cache, self.buffers, batch.rows)
        gated = self.gated(batch.rows)
        if gated is not None:
            attention = WithGated(attention, gated, after=False)
        outputs = torch.tensor(batch.outputs, dtype=torch.long, device=device)
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            normed = functional.rms_norm(hidden, hidden.shape[1:], layer.input_norm, self._eps)
            attended = self._attend(number, layer, normed, attention, rotary)
            if number == last and len(outputs) < len(hidden):
                attended, hidden = attended[outputs], hidden[outputs]
            hidden = hidden + layer.o(attended)
            normed = functional.rms_norm(hidden, hidden.shape[1:], layer.post_norm, self._eps)
            hidden = hidden + layer.mlp(normed)
        if len(outputs) == len(batch.token_ids):
            hidden = hidden[outputs]
        hidden = functional.rms_norm(hidden, hidden.shape[1:], self._final_norm, self._eps)
        # An id without an embedding could be sampled, but not be fed in afterwards.
        return Logits(self._head(hidden)[:, : self._num_ids])

    @torch.inference_mode()
    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a Decoder."""
        width = self.base.shape.num_kv_heads * self.base.shape.head_dim
        keys_values = self._layers[layer].qkv(inputs.to(self.device))[:, -2 * width :]
        return keys_values[:, :width], keys_values[:, width:]

    def _attend(
        self,
        number: int,
        layer: "_LeanLayer",
        normed: torch.Tensor,
        attention: StepAttention,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of the flat tokens [num_tokens, num_heads * head_dim] in layer ``number``."""
        shape = self.base.shape
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        qkv = layer.qkv(normed).view(len(normed), heads + 2 * kv_heads, shape.head_dim)
        rotated = qkv[:, : heads + kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated = torch.cat(
                [
                    functional.rms_norm(part, part.shape[2:], norm, self._eps)
                    for part, norm in (
                        (rotated[:, :heads], layer.q_norm),
                        (rotated[:, heads:], layer.k_norm),
                    )
                ],
                1,
            )
        cosine, sine = rotary
        half = shape.head_dim // 2
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
        rotated = rotated * cosine + turned * sine
        attention.write(number, rotated[:, heads:], qkv[:, heads + kv_heads :])
        attended = attention.attend(number, rotated[:, :heads], self._options[number])
        return attended.view(len(normed), -1)

    def _embeddings(self, batch: FlatBatch) -> torch.Tensor:
        ids = torch.tensor(batch.token_ids, device=self.device)
        embeddings = functional.embedding(ids, self._embedding)
        for offset, values in batch.inputs:
            embeddings[offset : offset + len(values)] = values.to(self.device)
        return embeddings


class _LeanLayer:
    """A layer with merged weights."""

    def __init__(self, layer: Layer) -> None:
        self.input_norm, self.post_norm = layer.input_norm, layer.post_norm
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        self.qkv = product_of([layer.q, layer.k, layer.v])
        self.o = product_of([layer.o])
        mlp = layer.mlp
        self.mlp = _LeanDense(mlp) if isinstance(mlp, Dense) else _LeanExperts(mlp)


class _LeanDense:
    def __init__(self, dense: Dense) -> None:
        self._gate_up = product_of([dense.gate, dense.up])
        self._down = product_of([dense.down])

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return _gated(hidden, self._gate_up, self._down)


class _LeanExperts:
    def __init__(self, experts: Experts) -> None:
        self._router = experts.router
        self._per_token, self._normalize = experts.per_token, experts.normalize
        self._experts = [
            (product_of([Linear(gate_up)]), product_of([Linear(down)]))
            for gate_up, down in zip(experts.gate_up, experts.down, strict=True)
        ]
        self._shared = None if experts.shared is None else _LeanDense(experts.shared)
        self._shared_gate = experts.shared_gate

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = functional.linear(hidden, self._router).softmax(-1, dtype=torch.float32)
        weights, chosen = scores.topk(self._per_token)
        if self._normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(hidden.dtype)
        out = torch.zeros_like(hidden)
        for index in sorted(set(chosen.flatten().tolist())):
            gate_up, down = self._experts[index]
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            answer = _gated(hidden[tokens], gate_up, down)
            out.index_add_(0, tokens, answer * weights[tokens, places, None])
        if self._shared is not None and self._shared_gate is not None:
            gate = functional.linear(hidden, self._shared_gate).sigmoid()
            out = out + gate * self._shared(hidden)
        return out


def _gated(hidden: torch.Tensor, gate_up: Product, down: Product) -> torch.Tensor:
    gate, up = gate_up(hidden).chunk(2, dim=-1)
    return down(functional.silu(gate) * up)
