"""GPT-Neo: scores are not scaled, and local layers have a window."""

from typing import Any

import torch
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, GPTNeoBlockAttention)


class GPTNeoBlockAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention over KV blocks."""

    @property
    def layer_idx(self) -> int:
        """The number of the layer, under the name that other families have."""
        return int(self.layer_id)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = (
            self._split_heads(projection(hidden_states), self.num_heads, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = kwargs["layer_past"].update(key, value, self.layer_idx)
        window = self.config.window_size if self.attention_type == "local" else None
        attended = attend(self, query, key, value, scaling=1.0, sliding_window=window)
        return self.out_proj(attended.flatten(2)), None
