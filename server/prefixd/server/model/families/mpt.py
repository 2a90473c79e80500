"""MPT: ALiBi with slopes of its own, and projections that may be clipped."""

from functools import cache
from typing import Any

import torch
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel, build_mpt_alibi_tensor

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, MptBlockAttention, UnmaskedMptModel)


class MptBlockAttention(MptAttention):
    """MPT's attention over KV blocks."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(-self.clip_qkv, self.clip_qkv)
        # 3 times [1, heads, num_tokens, head_dim]
        query, key, value = fused.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        key, value = kwargs["past_key_values"].update(key, value, self.layer_idx)
        slopes = _slopes(self.n_heads, query.device)
        attended = attend(self, query, key, value, scaling=self.softmax_scale, alibi=slopes)
        return self.out_proj(attended.flatten(2)), None


class UnmaskedMptModel(MptModel):
    """MPT's layers without a mask in our passes, where transformers insists on one: it takes one of
    four dimensions as it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if in_pass():
            mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.wte.weight.device)
            kwargs["attention_mask"] = mask
        return super().forward(*args, **kwargs)


@cache
def _slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    # The bias of the position before the last is minus the slope.
    slopes: torch.Tensor = -build_mpt_alibi_tensor(num_heads, 2, device=device)[:, 0, 0]
    return slopes
