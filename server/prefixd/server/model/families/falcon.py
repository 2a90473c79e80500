"""Falcon: rotary embeddings or ALiBi, keys and values of one head, of some or of all."""

from functools import cache
from typing import Any

import torch
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, FalconBlockAttention)


class FalconBlockAttention(FalconAttention):
    """Falcon's attention over KV blocks.

    In the architecture of Falcon-40B several heads share keys and values, but transformers caches
    them for every head, and so a KV prefix of PEFT has its own for every head.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = (
            states.transpose(1, 2)
            for states in self._split_heads(self.query_key_value(hidden_states))
        )
        alibi = None
        if self.config.alibi:
            alibi = _biases(self.num_heads, self.max_position_embeddings, query.device)
            alibi = alibi * self.inv_norm_factor
        else:
            query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        key, value = kwargs["layer_past"].update(key, value, self.layer_idx)
        attended = attend(self, query, key, value, scaling=self.inv_norm_factor, alibi=alibi)
        return self.dense(attended.flatten(2)), None


@cache
def _biases(num_heads: int, positions: int, device: torch.device) -> torch.Tensor:
    """The bias of each position [heads, positions], a product in bfloat16 in any serving dtype."""
    every = torch.ones(1, positions, dtype=torch.long, device=device)
    biases: torch.Tensor = build_alibi_tensor(every, num_heads, torch.float32)
    return biases[:, 0]
