"""Small models of the families whose attention is outside transformers' interface."""

from typing import Any

import torch
import transformers
from torch import nn

from tests.model.broken_models import random_model

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
OUTSIDE: dict[str, dict[str, Any]] = {
    "bloom": {},
    "bloom, 3 heads": {"hidden_size": 48, "num_attention_heads": 3},
    "bloom, in slices": {"pretraining_tp": 2, "slow_but_exact": True},
    "codegen": {"rotary_dim": 4},
    "falcon": {},
    "falcon, ALiBi": {  # slopes of 16 heads are not all powers of two: their products are rounded
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "hidden_size": 64,
        "num_attention_heads": 16,
    },
    "falcon, ALiBi and one KV head": {"alibi": True},
    "falcon, new architecture": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 24},
    "gpt_neox_japanese": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5}},
    "gptj": {"rotary_dim": 4},
    "mpt": {},
    "mpt, 3 heads": {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.2},
    },
    "xglm": {"ffn_dim": 48},
}
"""What differs from the sizes above, by family and variant."""


def outside_config(name: str) -> Any:
    """The config of a row of OUTSIDE."""
    fields = {**_SIZES, **OUTSIDE[name]}
    return transformers.AutoConfig.for_model(name.partition(",")[0], **fields)


def outside_model(name: str) -> Any:
    """A random model of a row of OUTSIDE, in which attention outweighs the token itself and every
    bias and norm counts."""
    model = random_model(outside_config(name))
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.add_(0.3 * torch.randn(weight.shape))
        elif id(weight) not in embeddings:
            weight.data.mul_(3)
    return model
