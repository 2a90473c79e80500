"""GPT-NeoX-Japanese: rotary embeddings of a part of each head, a bias that the layer adds."""

from typing import Any

import torch
from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import (
    GPTNeoXJapaneseAttention,
    apply_rotary_pos_emb,
)

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, GPTNeoXJapaneseBlockAttention)


class GPTNeoXJapaneseBlockAttention(GPTNeoXJapaneseAttention):
    """GPT-NeoX-Japanese's attention over KV blocks."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_pass():
            return super().forward(hidden_states, *args, **kwargs)
        fused = self.query_key_value(hidden_states)
        # 3 times [1, heads, num_tokens, head_size]
        query, key, value = fused.unflatten(2, (-1, 3, self.head_size)).permute(3, 0, 2, 1, 4)
        width = self.rotary_ndims
        turned = apply_rotary_pos_emb(
            query[..., :width], key[..., :width], *kwargs["position_embeddings"]
        )
        query, key = (
            torch.cat([part, whole[..., width:]], -1)
            for part, whole in zip(turned, (query, key), strict=True)
        )
        key, value = kwargs["layer_past"].update(key, value, self.layer_idx)
        attended = attend(self, query, key, value, scaling=1 / self.norm_factor)
        return self.dense(attended.flatten(2)), None, self.dense_bias
