"""int8 models in plain torch: a whole text at once, integer sums exact, the rest in float64.

The reference for what the native decoder computes from layers that ``Int8Parts`` rounded.
"""

import torch
from torch.nn import functional

from prefixd.server.model.parts import Dense, Experts, Layer, Linear, Parts


class Reference:
    """The model of ``parts``, whose layers it takes. KV has the dtype of the base, and the inputs
    of products are first rounded to ``operand``: AVX512-BF16 and AMX multiply bfloat16."""

    def __init__(self, parts: Parts, *, operand: torch.dtype = torch.float32) -> None:
        self.shape = parts.base.shape
        self._operand, self._kv = operand, parts.base.dtype
        self._eps, self._scale = parts.norm_eps, parts.attention_scale
        self._cosine, self._sine = (
            torch.cat([table, table], -1).double() for table in (parts.cosine, parts.sine)
        )
        self._layers = list(parts.take_layers())
        self._norm, self._head = parts.final_norm, parts.head
        self.embedding = parts.embedding

    @torch.inference_mode()
    def logits(self, inputs: torch.Tensor | list[int]) -> torch.Tensor:
        """Logits [n, vocab] of token ids, or of input embeddings [n, width]."""
        if isinstance(inputs, list):
            inputs = self.embedding[torch.tensor(inputs)]
        hidden = inputs.double()
        for layer in self._layers:
            hidden = hidden + self._attention(layer, self._normed(hidden, layer.input_norm))
            normed = self._normed(hidden, layer.post_norm)
            if isinstance(layer.mlp, Dense):
                hidden = hidden + self._dense(layer.mlp, normed)
            else:
                hidden = hidden + self._experts(layer.mlp, normed)
        return self._product(self._normed(hidden, self._norm), self._head).float()

    def _attention(self, layer: Layer, normed: torch.Tensor) -> torch.Tensor:
        heads, size = len(normed), self.shape.head_dim
        queries, keys, values = (
            self._product(normed, linear).view(heads, -1, size).transpose(0, 1)
            for linear in (layer.q, layer.k, layer.v)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = self._normed(queries, layer.q_norm)
            keys = self._normed(keys, layer.k_norm)
        queries, keys, values = (
            each.to(dtype).double()
            for each, dtype in (
                (self._rotated(queries), self._operand),
                (self._rotated(keys), self._kv),
                (values, self._kv),
            )
        )
        out = functional.scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            is_causal=True,
            scale=self._scale,
            enable_gqa=True,
        )
        return self._product(out[0].transpose(0, 1).flatten(1), layer.o)

    def _dense(self, dense: Dense, hidden: torch.Tensor) -> torch.Tensor:
        return self._gated(
            self._product(hidden, dense.gate), self._product(hidden, dense.up), dense.down
        )

    def _gated(self, gate: torch.Tensor, up: torch.Tensor, down: Linear) -> torch.Tensor:
        return self._product(functional.silu(gate) * up, down)

    def _experts(self, experts: Experts, hidden: torch.Tensor) -> torch.Tensor:
        scores = self._product(hidden, Linear(experts.router)).softmax(-1)
        weights, chosen = scores.topk(experts.per_token)
        if experts.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(hidden)
        for token, place in ((t, p) for t in range(len(hidden)) for p in range(chosen.shape[1])):
            number = int(chosen[token, place])
            gate_up, down = (
                Linear(weight[number], None, None if scales is None else scales[number])
                for weight, scales in (
                    (experts.gate_up, experts.gate_up_scales),
                    (experts.down, experts.down_scales),
                )
            )
            gate, up = self._product(hidden[token : token + 1], gate_up).chunk(2, -1)
            out[token] += weights[token, place] * self._gated(gate, up, down)[0]
        if experts.shared is not None and experts.shared_gate is not None:
            gate = self._product(hidden, Linear(experts.shared_gate)).sigmoid()
            out = out + gate * self._dense(experts.shared, hidden)
        return out

    def _product(self, inputs: torch.Tensor, linear: Linear) -> torch.Tensor:
        inputs = inputs.to(self._operand)
        weight = linear.weight.double()
        if linear.scales is None:
            out = inputs.double() @ weight.T
        else:
            codes, scales = codes_of(inputs)
            sums = (codes.double() @ weight.T).float()  # exact: below 2^53
            out = (sums * (scales[:, None] * linear.scales)).double()
        return out if linear.bias is None else out + linear.bias.double()

    def _normed(self, hidden: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], norm.double(), self._eps)

    def _rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """Of heads [num_heads, n, head_dim] at the positions 0 .. n."""
        count, half = heads.shape[1], heads.shape[2] // 2
        turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
        return heads * self._cosine[:count] + turned * self._sine[:count]


def codes_of(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row [in] by itself: codes of int8, and its scale max|x| / 127."""
    inputs = inputs.float()
    scales = inputs.abs().amax(1) / 127
    codes = (inputs / scales[:, None]).round()
    return torch.where(scales[:, None] > 0, codes, 0.0).to(torch.int8), scales
