"""The self-check refuses models whose logits depend on more than the tokens so far."""

import copy
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from prefixd.server.model import cgroups, float32, memory, selfcheck_compare
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.gated_places import add_after_projections
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.near_ties import near_ties
from prefixd.server.model.onsets import Onset, onsets_of
from prefixd.server.model.selfcheck import self_check
from prefixd.server.model.selfcheck_texts import short_texts
from tests.model.broken_models import (
    BROKEN,
    GATED,
    SMALL,
    changed,
    pooled,
    random_model,
    right_models,
)

WAYS = ["float32", "bfloat16", "bfloat16 by layer", "float16"]
"""The serving dtype, and whether the weights are widened one layer at a time."""


def base_of(model: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> LoadedBase:
    if way.endswith("by layer"):
        monkeypatch.setattr(float32, "free_bytes", lambda _: 0)
    return prepare_base(
        copy.deepcopy(model), None, name="m", dtype=way.partition(" ")[0], device="cpu"
    )


@pytest.fixture(scope="module")
def models() -> Any:
    """Models by name, each built once."""

    class Built(defaultdict[str, Any]):
        def __missing__(self, name: str) -> Any:
            configs = right_models()
            self[name] = random_model(configs[name]) if name in configs else BROKEN[name][0]()
            return self[name]

    return Built()


def hooks_of(base: LoadedBase) -> list[tuple[int, int]]:
    """How many hooks each part of the module has."""
    parts = base.module.modules()
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(BROKEN))
def test_a_wrong_model_is_refused_in_every_dtype(
    name: str, way: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks") as refusal:
        self_check(base_of(models[name], way, monkeypatch), block_size=16)
    assert BROKEN[name][1] in str(refusal.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(right_models()))
def test_a_right_model_passes_and_is_not_changed(
    name: str, way: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(models[name], way, monkeypatch)
    before = [(key, tensor, tensor.clone()) for key, tensor in base.module.state_dict().items()]
    buffers = {key: (buffer, buffer.clone()) for key, buffer in base.module.named_buffers()}
    add_after_projections(base.module, base.shape)
    hooks = hooks_of(base)
    self_check(base, block_size=16)
    for key, tensor, content in before:
        after = base.module.state_dict()[key]
        assert after.data_ptr() == tensor.data_ptr(), key
        assert after.dtype == content.dtype
        assert torch.equal(after, content), key
    for key, buffer in base.module.named_buffers():
        assert buffer is buffers[key][0]
        assert torch.equal(buffer, buffers[key][1]), key
    assert hooks_of(base) == hooks


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("seed", range(4))
def test_routing_to_experts_is_stable_in_float32(name: str, seed: int) -> None:
    model = random_model(right_models()[name], seed=seed)
    for dtype in ("float32", "bfloat16"):
        base = prepare_base(copy.deepcopy(model), None, name=name, dtype=dtype, device="cpu")
        self_check(base, block_size=16)


def rough_model() -> Any:
    """A DeepSeek V2 of the published inner sizes, with weights so large that scores are far apart:
    float32 changes its logits by a hundredth."""
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        **{**SMALL, "hidden_size": 64, "num_hidden_layers": 4},
        intermediate_size=96,
        num_key_value_heads=4,
        first_k_dense_replace=4,
        max_position_embeddings=512,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(0.21 / weight.std())
    return model


def test_a_model_whose_float32_is_rough_is_compared_as_its_float64_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = rough_model()
    weights = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu")
    self_check(base, block_size=16)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == weights[name][0].data_ptr()
        assert torch.equal(tensor, weights[name][1])
    monkeypatch.setattr(selfcheck_compare, "_GREATEST_OF_ALL", 0.0)
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks"):
        self_check(base, block_size=16)


def test_a_wrong_model_whose_float32_is_rough_is_refused() -> None:
    model = rough_model()
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: pooled(inner(x))
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks"):
        self_check(base, block_size=16)


@pytest.mark.parametrize("context", [1, 2, 3, 5, 6, 17, 40])
def test_texts_fit_a_short_context(context: int) -> None:
    config = transformers.LlamaConfig(**{**GATED, "max_position_embeddings": context})
    base = prepare_base(random_model(config), None, name="m", dtype="float32", device="cpu")
    self_check(base, block_size=16)


class FlippedRouter(MixtralTopKRouter):
    """Chooses the next best expert where two scores nearly tie, but not in a pass of the first text
    alone, of 5 tokens: what rounding may do. ``flips`` counts those tokens."""

    flips = 0

    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits, weights, chosen = super().forward(hidden_states)
        best = logits.float().softmax(-1).topk(self.top_k + 1)
        tied = best.values[:, -2] - best.values[:, -1] < 1e-6
        if len(tied) != 5:
            FlippedRouter.flips += int(tied.sum())
            chosen[tied, -1] = best.indices[tied, -1]
        return logits, weights, chosen


def tie_for(model: Any, token: int) -> None:
    """Give one token, wherever it stands, two experts with nearly equal scores in layer 0."""
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.data.zero_()  # the router sees the token alone
    state = layer.post_attention_layernorm(model.model.embed_tokens.weight[token])
    gate = layer.mlp.gate
    second, third = (gate.weight @ state).topk(3).indices[1:]
    excess = (gate.weight[second] - gate.weight[third]) @ state
    gate.weight.data[third] += (excess - 1e-7) * state / state.dot(state)
    gate.__class__ = FlippedRouter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_text_is_tried_when_rounding_chose_an_expert(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(right_models()["mixtral"]).to(getattr(torch, dtype)).float()
    texts = [
        short_texts(block_size=16, chunk=256, context=512, vocab_size=97, seed=seed)
        for seed in (0, 1)
    ]
    flipped = next(t for t in texts[0][0].tokens[:4] if t not in texts[1][0].tokens)
    with torch.no_grad():
        tie_for(model, flipped)
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu")
    monkeypatch.setattr(FlippedRouter, "flips", 0)
    self_check(base, block_size=16)
    assert FlippedRouter.flips > 0


def test_a_difference_without_a_near_tie_is_refused_at_once() -> None:
    passes = 0

    def wrong_at_first(x: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return x * 2 if passes == 6 else x

    base = prepare_base(changed(wrong_at_first), None, name="m", dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks"):
        self_check(base, block_size=16)


def test_near_ties_are_seen_only_where_a_choice_is_open() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 2.0 - 1e-6], [2.0, 2.0, 1.0]])
    with near_ties(3) as ties:
        scores.topk(2)
        torch.topk(scores, 3, dim=-1)
        torch.topk(torch.ones(5, 4), 2)  # not one row for each token
    assert ties.tolist() == [False, True, False]


def test_onsets_are_the_positions_that_the_config_names() -> None:
    config = transformers.LlamaConfig(
        **{**GATED, "max_position_embeddings": 20000},
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 5000,
        },
        sliding_window=300,
        max_window_layers=28,
        sliding_window_pattern=6,
        use_sliding_window=True,
        attention_chunk_size=8192,
        sparse={"dense_len": 700, "index_topk": None},
        floor_scale=32768,
    )
    assert onsets_of(config, context=20000) == [
        Onset("sliding_window", 300),
        Onset("sparse.dense_len", 700),
        Onset("rope_parameters.original_max_position_embeddings", 5000),
        Onset("attention_chunk_size", 8192),
    ]
    for key in ("mixing_onset", "long_context_threshold", "scale_after", "attn_switch_position"):
        named = transformers.LlamaConfig(**{**GATED, key: 400})
        assert onsets_of(named, context=512) == [Onset(key, 400)]
    other = transformers.LlamaConfig(**GATED, num_position_groups=4, moe_layer_start_index=3)
    assert onsets_of(other, context=512) == []
    assert onsets_of(config, context=301) == [Onset("sliding_window", 300)]
    assert onsets_of(config, context=300) == []


@pytest.mark.parametrize("onset", [4090, 4096])
def test_an_onset_beyond_the_longest_text_is_named_at_start(
    onset: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = transformers.LlamaConfig(**{**GATED, "max_position_embeddings": 8192})
    config.floor_scale = onset
    base = prepare_base(random_model(config), None, name="m", dtype="float32", device="cpu")
    with caplog.at_level(logging.WARNING):
        self_check(base, block_size=16)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"m was not checked from position {onset} on, where floor_scale of its config changes the "
        "output: the longest text of the self-check has 4096 tokens"
    )


def test_one_layer_at_a_time_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "free_bytes", lambda _: 0)
    model = random_model(right_models()["llama"]).bfloat16()
    wide: list[set[str]] = []

    def record(*_: Any) -> None:
        wide.append({n for n, p in model.named_parameters() if p.dtype is torch.float32})

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(record)
    with torch.no_grad(), float32.float32_arithmetic(model, scratch_bytes=0):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    of_layer = [
        {n for n, _ in model.named_parameters() if n.startswith(f"model.layers.{i}.")}
        for i in range(2)
    ]
    assert wide == of_layer


def test_weights_return_after_a_failed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "free_bytes", lambda _: 0)
    model = random_model(right_models()["llama"]).bfloat16()

    def fail(*_: Any) -> None:
        raise ValueError("failed")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with (
        pytest.raises(ValueError, match="failed"),
        float32.float32_arithmetic(model, scratch_bytes=0),
    ):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    hook.remove()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_state_that_a_pass_changes_is_restored() -> None:
    model = random_model(right_models()["llama"])
    rotary = model.model.rotary_emb
    frequencies = rotary.inv_freq.clone()
    with float32.float32_arithmetic(model, scratch_bytes=0):
        rotary.inv_freq.mul_(2)
        rotary.register_buffer("inv_freq", torch.zeros(3), persistent=False)
        rotary.longest = 7
    assert torch.equal(rotary.inv_freq, frequencies)
    assert not hasattr(rotary, "longest")


def test_half_precision_that_overflows_is_refused() -> None:
    model = random_model(right_models()["llama"])
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    model.model.layers[0].mlp.down_proj.weight.data.clamp_(-6e4, 6e4)
    with pytest.raises(UnsupportedModel, match="not finite in float16"):
        self_check(
            prepare_base(copy.deepcopy(model), None, name="m", dtype="float16", device="cpu"),
            block_size=16,
        )
    self_check(prepare_base(model, None, name="m", dtype="bfloat16", device="cpu"), block_size=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, dtype: str) -> None:
    model = random_model(right_models()["llama"])
    table = model.get_input_embeddings().weight.data
    model.model.norm.weight.data[3] = value
    with pytest.raises(UnsupportedModel, match="logits that are not finite in float32"):
        self_check(
            prepare_base(copy.deepcopy(model), None, name="m", dtype=dtype, device="cpu"),
            block_size=16,
        )
    model.model.norm.weight.data[3] = 1.0
    table[-1] = value  # a token that no text of the check may have
    with pytest.raises(UnsupportedModel, match="input embeddings that are not finite"):
        self_check(prepare_base(model, None, name="m", dtype=dtype, device="cpu"), block_size=16)


MEMINFO = "MemTotal: 1000 kB\nMemAvailable: 800 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"proc/meminfo": MEMINFO}, 800 * 1024),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/b/memory.current": "9\n",
                "cgroup/a/b/memory.stat": "inactive_file 0\n",
                "cgroup/a/memory.max": "5000\n",
                "cgroup/a/memory.current": "3000\n",
                "cgroup/a/memory.stat": "anon 9\ninactive_file 500\n",
            },
            2500,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:cpu:/x\n3:memory:/docker/x\n",
                "cgroup/memory/memory.limit_in_bytes": "4000\n",
                "cgroup/memory/memory.usage_in_bytes": "5000\n",
                "cgroup/memory/memory.stat": "total_inactive_file 100\n",
            },
            0,
        ),
    ],
    ids=["unknown", "host", "cgroup 2", "cgroup 1"],
)
def test_free_memory_is_the_least_that_the_host_and_its_cgroups_leave(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    assert memory.free_bytes(torch.device("cpu")) == expected
