"""Models that cannot be served correctly are rejected by name, by config or by self-check."""

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
from prefixd.server.model.load import prepare_base
from prefixd.server.model.selfcheck import Limits, self_check
from tests.model.broken_models import random_model

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "t5.*encoder-decoder"),
        (transformers.GPT2Config(add_cross_attention=True), "gpt2.*cross-attention"),
        (
            transformers.LlamaConfig(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "llama.*dynamic rotary",
        ),
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


def test_a_mixture_of_experts_is_served_unless_it_returns_router_logits() -> None:
    def mixtral(flag: bool) -> Any:
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **GATED, num_local_experts=4, sliding_window=None, output_router_logits=flag
            )
        )

    check(mixtral(False))
    with pytest.raises(UnsupportedModel, match="attention options: output_router_logits"):
        check(mixtral(True))


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
