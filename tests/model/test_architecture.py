"""Models that cannot be served correctly are rejected by name, by config or by self-check."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prefixd.server.model.architecture import (
    UnsupportedModel,
    refuse_unsupported,
    served_context,
    shape_of,
)
from prefixd.server.model.fingerprint import fingerprint_of
from prefixd.server.model.load import load_base, prepare_base
from prefixd.server.model.selfcheck import Limits, self_check
from tests.model.broken_models import random_model
from tests.model.tiny_folder import SIZES, save_folder

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "t5.*encoder-decoder"),
        (transformers.GPT2Config(add_cross_attention=True), "gpt2.*cross-attention"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_unsupported_configs_are_rejected_by_name(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        refuse_unsupported(config, context=served_context(config, pool_tokens=16384))


WINDOWED = [
    transformers.MistralConfig(**GATED, sliding_window=64),
    transformers.Qwen2Config(
        **GATED, use_sliding_window=True, sliding_window=64, max_window_layers=0
    ),
    transformers.Olmo3Config(**GATED, sliding_window=64),
    transformers.Cohere2Config(**GATED, sliding_window=64),
]


@pytest.mark.parametrize("config", WINDOWED, ids=lambda config: config.model_type)
def test_a_window_as_long_as_the_served_context_is_no_window(config: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    fitting, longer = (
        prepare_base(model, None, name="m", dtype="float32", device="cpu", pool_tokens=tokens)
        for tokens in (64, 65)
    )
    assert (fitting.context, longer.context) == (64, 65)
    assert fitting.layers.beyond_plain() is None
    assert longer.layers.beyond_plain() == "a sliding window of 64 tokens in layer 0"


def test_attention_may_be_scaled_by_the_position_of_a_token() -> None:
    """Llama 4 asks its cache for the position of the first token of a pass."""
    config = transformers.Llama4TextConfig(
        **{**GATED, "num_hidden_layers": 4}, head_dim=8, intermediate_size_mlp=48,
        num_local_experts=2, floor_scale=8, attn_scale=2.0,
    )  # fmt: skip
    assert not config.no_rope_layers[3]
    model = random_model(config)
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu", pool_tokens=256)
    self_check(base, block_size=16)


def test_the_served_context_is_what_the_model_and_the_pool_can_hold() -> None:
    config = transformers.LlamaConfig(**GATED, max_position_embeddings=512)
    assert served_context(config, pool_tokens=None) == 512
    assert served_context(config, pool_tokens=80) == 80
    assert served_context(config, pool_tokens=1024) == 512


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 96,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
HUNYUAN = {**GATED, "head_dim": 8, "rope_parameters": {**DYNAMIC, "alpha": 1000.0}}
SCALED_WITH_THE_LENGTH = [
    (transformers.Phi3Config(**GATED, pad_token_id=0, rope_parameters=LONGROPE,
        original_max_position_embeddings=96, max_position_embeddings=512), 96),
    (transformers.PhimoeConfig(**GATED, num_local_experts=4, max_position_embeddings=512,
        rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}), 96),
    (transformers.LlamaConfig(**GATED, rope_parameters=DYNAMIC, max_position_embeddings=112), 112),
    (transformers.HunYuanDenseV1Config(**HUNYUAN, max_position_embeddings=112), 112),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "positions"),
    SCALED_WITH_THE_LENGTH,
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_rotary_embeddings_that_change_with_the_length_are_served_up_to_where_they_do(
    config: Any, positions: int
) -> None:
    base = prepare_base(random_model(config), None, name="m", dtype="float32", device="cpu")
    assert base.context == base.shape.max_positions == positions
    self_check(base, block_size=16)


def test_the_log_names_the_positions_past_which_rotary_embeddings_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {**SIZES, "max_position_embeddings": 512, "rope_parameters": LONGROPE}
    model = random_model(transformers.LlamaConfig(**sizes))
    save_folder(model, tmp_path)
    base = load_base(str(tmp_path), dtype="float32", device="cpu", cache_dir=tmp_path)
    assert base.context == 96
    assert "served up to 96 positions" in caplog.text


def test_a_window_that_transformers_puts_in_the_mask_alone_is_a_window() -> None:
    config = transformers.PhimoeConfig(**GATED, num_local_experts=4, sliding_window=8)
    base = prepare_base(random_model(config), None, name="m", dtype="float32", device="cpu")
    assert base.layers.beyond_plain() == "a sliding window of 8 tokens in layer 0"
    self_check(base, block_size=16)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.MptConfig(max_seq_len=96), 96),
        (transformers.BloomConfig(seq_length=96), 96),
        (transformers.BloomConfig(), 128),
    ],
    ids=["mpt", "bloom", "bloom without a length"],
)
def test_positions_under_other_names_and_without_any(config: Any, positions: int) -> None:
    context = served_context(config, pool_tokens=128)
    assert context == positions
    assert shape_of(config, embedding_width=64, context=context).max_positions == positions


def check(model: Any, *, dtype: str = "float32", block_size: int = 16) -> Limits:
    base = prepare_base(model, None, name="m", dtype=dtype, device="cpu")
    return self_check(base, block_size=block_size).limits


def test_the_self_check_rejects_wrong_positions() -> None:
    """A model that ignores ``position_ids`` gives other logits over blocks."""

    class Positionless(transformers.GPT2LMHeadModel):
        def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    model = Positionless(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    for weight in model.parameters():
        weight.data.mul_(4)
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks"):
        check(model)


def test_a_limit_that_transformers_applies_to_several_tokens_alone_is_named() -> None:
    config = transformers.Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, n_groups=1,
        state_size=8, time_step_limit=(0.01, 0.05),
    )  # fmt: skip
    with pytest.raises(
        UnsupportedModel, match="cut into chunks: transformers applies its time_step_limit"
    ):
        check(random_model(config))


def test_the_self_check_rejects_layers_without_attention() -> None:
    class SkippedAttention(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return hidden_states, None

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED))
    model.model.layers[1].self_attn.__class__ = SkippedAttention
    with pytest.raises(UnsupportedModel, match="1 of its 2 layers use"):
        check(model)


def test_a_family_with_attention_of_its_own_is_refused_by_the_name_of_that() -> None:
    config = transformers.RoFormerConfig(**SMALL, intermediate_size=48, is_decoder=True)
    reason = "RoFormerSelfAttention computes attention in code of its own"
    with pytest.raises(UnsupportedModel, match=reason):
        check(transformers.RoFormerForCausalLM(config))


def model_with_option(**option: Any) -> Any:
    """A Llama whose first layer passes one more option to attention."""

    class OptionAttention(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, **option)

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED))
    model.model.layers[0].self_attn.__class__ = OptionAttention
    return model


UNKNOWN = [("flag_of_tomorrow", value) for value in (30.0, 0.0, 0, True, "", torch.zeros(2))]
MEANINGLESS = [
    *(("softcap", value) for value in (0.0, -1.0, True, "", torch.zeros(2))),
    *(("sliding_window", value) for value in (0, -1, 2.5, True, "")),
    *(("s_aux", value) for value in (1.0, True, torch.zeros(2, 2))),
]


@pytest.mark.parametrize(("name", "value"), [*UNKNOWN, *MEANINGLESS], ids=repr)
def test_an_attention_option_that_is_not_computed_is_rejected_by_name(
    name: str, value: Any
) -> None:
    with pytest.raises(UnsupportedModel, match=f"needs unsupported attention options: {name}"):
        check(model_with_option(**{name: value}))


@pytest.mark.parametrize("value", [None, False])
@pytest.mark.parametrize("name", ["softcap", "sliding_window", "flag_of_tomorrow"])
def test_an_attention_option_that_is_off_is_ignored(name: str, value: Any) -> None:
    check(model_with_option(**{name: value}))


EXPERTS = {**GATED, "num_local_experts": 4, "sliding_window": None}
FALCON = {**SMALL, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(**EXPERTS, output_router_logits=True),
        transformers.LlamaConfig(**GATED, output_hidden_states=True, use_cache=False),
        transformers.LlamaConfig(**GATED, return_dict=False),
        transformers.FalconConfig(**FALCON, output_attentions=True),
        transformers.BloomConfig(**SMALL, seq_length=128, return_dict=False),
    ],
    ids=lambda config: config.model_type,
)
def test_configs_with_further_outputs_are_served(config: Any) -> None:
    model = random_model(config)
    before = fingerprint_of(model, None)
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu")
    assert base.fingerprint == before
    self_check(base, block_size=16)


def test_an_encoder_is_rejected_because_its_tokens_see_later_ones() -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=48)
    with pytest.raises(UnsupportedModel, match="BertSelfAttention lets tokens see later ones"):
        check(transformers.BertLMHeadModel(config))


@pytest.mark.parametrize(("name", "value"), [("softcap", 1e-3), ("sliding_window", 2)])
def test_an_option_that_the_models_own_attention_ignores_gives_other_logits(
    name: str, value: float
) -> None:
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks"):
        check(model_with_option(**{name: value}))


def test_latents_of_two_widths_are_cached_as_they_are() -> None:
    config = transformers.DeepseekV3Config(
        **{**GATED, "num_key_value_heads": 4},
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    model = random_model(config)
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu")
    assert [cache.shape for cache in base.layers.caches.values()] == [(1, 16, 8)] * 2
    self_check(base, block_size=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [1, 16, 1024])
def test_every_dtype_passes_the_self_check_in_blocks_of_any_size(
    dtype: str, block_size: int
) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED))
    limits = check(model, dtype=dtype, block_size=block_size)
    assert limits.max_abs_kv > 1
    assert limits.max_abs_embedding > 1


def test_the_fingerprint_depends_on_the_base_and_not_on_the_serving_dtype() -> None:
    def model(seed: int, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED, **changes))

    first = fingerprint_of(model(0), None)
    assert fingerprint_of(model(0), None) == first
    assert fingerprint_of(model(1), None) != first
    assert fingerprint_of(model(0, rms_norm_eps=1e-5), None) != first
    served = [
        prepare_base(model(0), None, name="m", dtype=dtype, device="cpu").fingerprint
        for dtype in ("float32", "bfloat16")
    ]
    assert served == [first, first]
