"""BLOOM: ALiBi, and one projection for queries, keys and values."""

from functools import cache
from typing import Any

import torch
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes

from prefixd.server.model.attention import attend, in_pass
from prefixd.server.model.families.classes import replace_classes


def adapt(module: Any) -> None:
    """Let the attention of a loaded model run over KV blocks."""
    replace_classes(module, BloomBlockAttention)


class BloomBlockAttention(BloomAttention):
    """BLOOM's attention over KV blocks."""

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not in_pass():
            return super().forward(hidden_states, residual, *args, **kwargs)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        key, value = kwargs["layer_past"].update(key, value, self.layer_idx)
        slopes = _slopes(self.num_heads, query.device)
        attended = attend(self, query, key, value, scaling=self.inv_norm_factor, alibi=slopes)
        return self._project(attended.flatten(2)) + residual, None

    def _project(self, attended: torch.Tensor) -> torch.Tensor:
        """The output projection: in slices, as a model may want it, transformers adds no bias."""
        projected: torch.Tensor
        if self.pretraining_tp > 1 and self.slow_but_exact:
            projected = torch.nn.functional.linear(attended, self.dense.weight)
        else:
            projected = self.dense(attended)
        return projected


@cache
def _slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    slopes: torch.Tensor = _get_alibi_slopes(num_heads, device)
    return slopes
