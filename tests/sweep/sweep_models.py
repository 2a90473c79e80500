"""Tiny random models of the sweep: small windows, and weights by which the context decides."""

from typing import Any

import torch
import transformers

from tests.golden.families import FAMILIES, SIZES

WINDOW = 24
"""Positions of a window or chunk: shorter than the prefixes, the long prompts and the outputs."""

_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
_SLIDING = {**_ALTERNATING, "sliding_window": WINDOW}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

_SHORT: dict[str, dict[str, Any]] = {
    "cohere2": _SLIDING,
    "exaone4": _SLIDING,
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma4_text": _SLIDING,
    "gemma3n_text": _SLIDING,
    "gpt_neo": {"window_size": WINDOW},
    "gpt_oss": _SLIDING,
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0],
    },
    "mistral": {"sliding_window": WINDOW},
    "olmo3": _SLIDING,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
}
"""What differs from the configs of ``FAMILIES``: no published model has such small windows."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "mistral, no window": {"sliding_window": None},
    "phi3, window": {"sliding_window": WINDOW},
    "qwen2, window": {**_SLIDING, "use_sliding_window": True},
    "phi3, longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4],
            "long_factor": [4.0] * 8,
        },
        "original_max_position_embeddings": 256,
    },
    "phimoe, window": {"sliding_window": WINDOW},
    "starcoder2, window": {"sliding_window": WINDOW},
    "laguna, window": _SLIDING,
    "mellum, window": _SLIDING,
    "dots1, window": _SLIDING,
    "falcon, ALiBi": {"alibi": True},
    "falcon, grouped heads": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1, scaled words": {"embedding_multiplier": 4.0},
    "gpt_bigcode, all heads": {"multi_query": False},
    "qwen3_next, attention first": {
        "layer_types": ["full_attention", *["linear_attention"] * 3],
        "num_hidden_layers": 4,
        "linear_conv_kernel_dim": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 24,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    },
    "gemma4_text, shared KV": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": WINDOW,
    },
}

SWEEP = (*FAMILIES, *_VARIANTS)
"""The rows: families, then variants, each named ``family, what differs``."""


def sweep_config(row: str, *, window: int = WINDOW) -> Any:
    """The config of a row, with windows and chunks of ``window`` positions."""
    family = row.partition(",")[0]
    fields = {**SIZES, **FAMILIES.get(row, FAMILIES[family]), **_SHORT.get(row, {})}
    fields |= _VARIANTS.get(row, {})
    fields["tie_word_embeddings"] = False  # tied, random models repeat their last token
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        if fields.get(name) == WINDOW:
            fields[name] = window
    kept = {
        name: value
        for name, value in fields.items()
        if value is not None or name == "sliding_window"
    }
    return transformers.AutoConfig.for_model(family, **kept)


def has_window(row: str) -> bool:
    """Whether some layers of a row have a window or chunk of WINDOW positions."""
    return sweep_config(row).to_diff_dict() != sweep_config(row, window=WINDOW + 1).to_diff_dict()


def sweep_model(row: str, *, window: int = WINDOW) -> Any:
    """A random model of a row. The same weights with any window.

    Matrices are large enough for attention to outweigh the token itself. Vectors differ from their
    initial zeros and ones: biases, the weights of norms, sinks, the decay of states. So a model
    computed without one of them has other tokens.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(sweep_config(row, window=window)).eval()
    embeddings = {
        id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)
    }
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() <= 1:
                weight.add_(0.3 * torch.randn(weight.shape))
            else:
                _spread(weight, 0.08 if id(weight) in embeddings else 0.24)
    return model


def _spread(weight: torch.Tensor, least: float) -> None:
    """Scale a matrix to a standard deviation of at least ``least``."""
    deviation = float(weight.std())
    if deviation == 0:
        weight.normal_(std=least)
    elif deviation < least:
        weight.mul_(least / deviation)
