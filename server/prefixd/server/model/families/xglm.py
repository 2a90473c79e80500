"""XGLM: positions from a table of sines that transformers rounds to the checkpoint's dtype."""

from typing import Any

import torch
from transformers.models.xglm.modeling_xglm import XGLMAttention, XGLMSinusoidalPositionalEmbedding

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks, with exact positions."""
    replace_classes(module, XGLMBlockAttention)
    for part in module.modules():
        if isinstance(part, XGLMSinusoidalPositionalEmbedding):
            table = part.get_embedding(len(part.weights), part.embedding_dim, part.padding_idx)
            part.weights = torch.nn.Buffer(
                table.to(part.weights.device, module.dtype), persistent=False
            )


class XGLMBlockAttention(XGLMAttention):
    """XGLM's attention over KV blocks."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = kwargs["past_key_values"].update(key, value, self.layer_idx)
        attended = attend(self, query, key, value, scaling=self.scaling)
        return self.out_proj(attended.flatten(2)), None
