"""CodeGen: GPT-J's rotary embeddings, and one projection laid out for four processors."""

from typing import Any

import torch
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes
from prefixd.server.model.families.gptj import rotated

_PROCESSORS = 4
"""Groups of heads in the projection; each has its queries, values and keys."""


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, CodeGenBlockAttention)


class CodeGenBlockAttention(CodeGenAttention):
    """CodeGen's attention over KV blocks."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        # [1, num_tokens, processors, 3, heads of a processor, head_dim]
        fused = self.qkv_proj(hidden_states).unflatten(2, (_PROCESSORS, 3, -1, self.head_dim))
        query, value, key = (part.flatten(2, 3) for part in fused.unbind(3))
        query = rotated(self, query, kwargs["position_ids"])
        key = rotated(self, key, kwargs["position_ids"])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        key, value = kwargs["layer_past"].update(key, value, self.layer_idx)
        attended = attend(self, query, key, value, scaling=1 / self.scale_attn)
        return self.out_proj(attended.flatten(2)), None
