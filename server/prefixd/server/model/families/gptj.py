"""GPT-J: rotary embeddings of neighbouring pairs, of a part of each head."""

from typing import Any

import torch
from transformers.models.gptj.modeling_gptj import GPTJAttention, apply_rotary_pos_emb

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, GPTJBlockAttention)


class GPTJBlockAttention(GPTJAttention):
    """GPT-J's attention over KV blocks."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotated(self, query, kwargs["position_ids"])
        key = rotated(self, key, kwargs["position_ids"])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        key, value = kwargs["layer_past"].update(key, value, self.layer_idx)
        attended = attend(self, query, key, value, scaling=1 / self.scale_attn)
        return self.out_proj(attended.flatten(2)), None


def rotated(module: Any, states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Queries or keys [1, num_tokens, heads, head_dim], rotated to their positions
    [1, num_tokens]. ``module`` is the attention of GPT-J or CodeGen."""
    width = module.rotary_dim or module.head_dim
    sine, cosine = module.embed_positions[position_ids].to(states.dtype).chunk(2, -1)
    turned = apply_rotary_pos_emb(states[..., :width], sine, cosine)
    return torch.cat([turned, states[..., width:]], -1)
