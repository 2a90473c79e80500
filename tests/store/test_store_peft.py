"""Real adapters, made by PEFT on tiny random models: what is read equals what PEFT itself uses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from prefixd.store.artifact.artifact import Artifact, inspect_peft, pack_peft, read_artifact  # noqa: E402 (only after the imports that may be missing)
from prefixd.store.artifact.base_spec import BaseSpec  # noqa: E402
from prefixd.store.errors import ArtifactRefused  # noqa: E402

# PEFT's and transformers' warnings about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

P = 5
TASK = 2


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(7)


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


LLAMA = BaseSpec("llama", "a" * 64, 3, 2, 16, 32, 64, "float32", 100.0, 100.0)
GPT2 = BaseSpec("gpt2", "b" * 64, 2, 4, 8, 32, 64, "float32", 100.0, 100.0)
MODELS: dict[str, tuple[Callable[[], Any], BaseSpec]] = {
    "llama": (llama, LLAMA),
    "gpt2": (gpt2, GPT2),
}


def configs() -> dict[str, Any]:
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    return {
        "PROMPT_TUNING": peft.PromptTuningConfig(**common),
        "P_TUNING": peft.PromptEncoderConfig(**common, encoder_hidden_size=24),
        "CPT": peft.CPTConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            cpt_token_ids=list(range(P)),
            cpt_mask=[1] * P,
            cpt_tokens_type_mask=[1, 2, 3, 4, 1],
        ),
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
            **common, num_tasks=3, num_ranks=2
        ),
        "PREFIX_TUNING": peft.PrefixTuningConfig(
            **common, prefix_projection=True, encoder_hidden_size=24
        ),
        "CARTRIDGE": peft.CartridgeConfig(**common, num_frozen_tokens=1),
    }


def save(model: Any, directory: Path, dtype: str) -> tuple[bytes, Path]:
    model.save_pretrained(directory)
    weights = directory / "adapter_model.safetensors"
    if dtype != "float32":
        named = safetensors_torch.load_file(weights)
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in named.items()}
        safetensors_torch.save_file(cast, weights, metadata={"format": "pt"})
    return (directory / "adapter_config.json").read_bytes(), weights


def store_and_read(config: bytes, weights: Path, base: BaseSpec, task_id: int | None) -> Artifact:
    summary = inspect_peft(config, weights, base=base, task_id=task_id)
    target = weights.parent / "artifact"
    pack_peft(config, weights, target, task_id=task_id)
    artifact = read_artifact(target, base=base, count_tokens=len)
    for field in type(summary).__slots__:
        assert getattr(artifact, field) == getattr(summary, field)
    return artifact


def used_by_peft(model: Any, peft_type: str, directory: Path) -> np.ndarray:
    """[P, width] as PEFT's own get_prompt gives it to the model, from the saved adapter."""
    fresh = peft.PeftModel.from_pretrained(model.get_base_model(), directory)
    tasks = torch.tensor([TASK]) if peft_type == "MULTITASK_PROMPT_TUNING" else None
    with torch.no_grad():
        prompt = fresh.get_prompt(batch_size=1, task_ids=tasks)
    if peft_type not in {"PREFIX_TUNING", "CARTRIDGE"}:
        return np.asarray(prompt[0].numpy())
    layers = [(layer.keys[0], layer.values[0]) for layer in prompt.layers]
    # Each [kv_heads, P, head_dim]; the file's row is layer, K or V, head, dim.
    stacked = torch.stack([half for layer in layers for half in layer])
    return np.asarray(stacked.permute(2, 0, 1, 3).reshape(P, -1).numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("peft_type", list(configs()))
@pytest.mark.parametrize("name", list(MODELS))
def test_values_equal_those_that_peft_uses(
    tmp_path: Path, name: str, peft_type: str, dtype: str
) -> None:
    make, base = MODELS[name]
    model = peft.get_peft_model(make(), configs()[peft_type])
    config, weights = save(model, tmp_path, dtype)
    task_id = TASK if peft_type == "MULTITASK_PROMPT_TUNING" else None

    artifact = store_and_read(config, weights, base, task_id)

    assert (artifact.peft_type, artifact.dtype, artifact.task_id) == (peft_type, dtype, task_id)
    assert artifact.values is not None
    assert artifact.values.dtype == np.float32
    expected = used_by_peft(model, peft_type, tmp_path)
    if task_id is None:
        np.testing.assert_array_equal(artifact.values, expected)
    else:  # a product of two matrices, summed by another library
        np.testing.assert_allclose(artifact.values, expected, rtol=1e-6, atol=1e-9)


def test_each_task_makes_a_different_prefix(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), configs()["MULTITASK_PROMPT_TUNING"])
    config, weights = save(model, tmp_path, "float32")
    first, second = (store_and_read(config, weights, LLAMA, task).values for task in (0, 1))
    assert first is not None
    assert second is not None
    assert not np.allclose(first, second)


def test_a_null_task_type_is_served(tmp_path: Path) -> None:
    """PEFT silently skips such a prefix; the trained tensor is the same."""
    model = peft.get_peft_model(llama(), configs()["PROMPT_TUNING"])
    config, weights = save(model, tmp_path, "float32")
    nulled = config.replace(b'"task_type": "CAUSAL_LM"', b'"task_type": null')
    assert nulled != config
    assert store_and_read(nulled, weights, LLAMA, None).num_virtual_tokens == P


def test_an_adapter_of_another_model_is_rejected(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), configs()["PREFIX_TUNING"])
    config, weights = save(model, tmp_path, "float32")
    with pytest.raises(
        ArtifactRefused, match="num_layers 3, but PREFIX_TUNING for the base gpt2 needs"
    ):
        inspect_peft(config, weights, base=GPT2)
    with pytest.raises(ArtifactRefused, match="at most 4 virtual tokens, got 5"):
        inspect_peft(config, weights, base=replace(LLAMA, max_virtual_tokens=4))
