"""Configs of small models of 61 families, and of some variants."""

from typing import Any

import transformers

from tests.golden.golden_harness import VOCAB, random_model

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {"intermediate_size": 96, "num_key_value_heads": 2}
_HEADS = {**_GATED, "head_dim": 16}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "intermediate_size": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
_LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "arcee": _GATED,
    "bitnet": _GATED,
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": _GATED,
    "cohere2": _GATED,
    "deepseek_v2": {**_LATENT, **_EXPERTS},
    "deepseek_v3": {**_LATENT, **_EXPERTS},
    "diffllama": _GATED,
    "dots1": {**_GATED, **_EXPERTS},
    "ernie4_5": _HEADS,
    "exaone4": _GATED,
    "falcon": {},
    "falcon_h1": {
        **_GATED,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
    },
    "gemma": {**_HEADS, "tie_word_embeddings": False},
    "gemma2": _HEADS,
    "gemma3_text": _HEADS,
    "gemma4_text": {
        **_HEADS,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "glm": _HEADS,
    "glm4": _HEADS,
    "glm4_moe": {**_GATED, **_EXPERTS},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {"intermediate_size": 96},
    "gpt_oss": {**_HEADS, **_EXPERTS},
    "gptj": {"rotary_dim": 8},
    "granite": _GATED,
    "granitemoe": {**_GATED, **_EXPERTS},
    "helium": _HEADS,
    "hunyuan_v1_dense": {
        **_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "jamba": {
        **_GATED,
        **_EXPERTS,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "lfm2": {**_GATED, "layer_types": ["conv", "full_attention"]},
    "llama": _GATED,
    "llama4_text": {**_HEADS, **_EXPERTS, "intermediate_size_mlp": 96},
    "mamba2": {"num_attention_heads": None, "num_heads": 4, "head_dim": 32, "n_groups": 1},
    "minimax": {**_HEADS, **_EXPERTS},
    "mistral": _GATED,
    "mixtral": {**_GATED, **_EXPERTS},
    "mpt": {},
    "nemotron": _GATED,
    "olmo": _GATED,
    "olmo2": _GATED,
    "olmo3": _GATED,
    "olmoe": {**_GATED, **_EXPERTS},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {"intermediate_size": 96},
    "phi": _GATED,
    "phi3": _GATED,
    "phimoe": {**_GATED, **_EXPERTS},
    "qwen2": _GATED,
    "qwen2_moe": {**_GATED, **_EXPERTS},
    "qwen3": _HEADS,
    "qwen3_5_text": {**_HEADS, **_LINEAR},
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "qwen3_next": {**_HEADS, **_EXPERTS, **_LINEAR},
    "seed_oss": _HEADS,
    "smollm3": _GATED,
    "stablelm": _GATED,
    "starcoder2": _GATED,
    "xglm": {"ffn_dim": 96},
    # More mixtures of experts, and variants of families above.
    "doge": {**_GATED, **_EXPERTS},
    "ernie4_5_moe": {
        **_HEADS,
        **_EXPERTS,
        "moe_layer_start_index": 0,
        "moe_num_experts": 4,
        "moe_k": 2,
    },
    "flex_olmo": {**_GATED, **_EXPERTS},
    "flint": {**_GATED, **_EXPERTS},
    "granitemoeshared": {**_GATED, **_EXPERTS, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {
        **_HEADS,
        **_EXPERTS,
        "moe_topk": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "jetmoe": {**_GATED, **_EXPERTS, "kv_channels": 32},
    "laguna": {**_HEADS, **_EXPERTS},
    "mellum": {**_HEADS, **_EXPERTS},
    "minimax_m2": {**_HEADS, **_EXPERTS, "rotary_dim": 16},
    "minimax_m3_vl_text": {**_HEADS, **_EXPERTS},
    "gemma3n_text": {
        **_HEADS,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.95, 0.0],
    },
    "lfm2, attention only": {**_GATED, "layer_types": ["full_attention"] * 2},
    "opt, embeddings of 32": {
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
}


EXPERTS = [
    "ernie4_5_moe",
    "flex_olmo",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "laguna",
    "mellum",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
]
"""Mixtures of experts that pass flags along to attention."""


def family_model(name: str, **changes: Any) -> Any:
    """A random model of one row, whose config has ``changes``."""
    fields = {**SIZES, **FAMILIES[name], **changes}
    fields = {field: value for field, value in fields.items() if value is not None}
    kind = name.partition(",")[0]
    return random_model(transformers.AutoConfig.for_model(kind, **fields))
