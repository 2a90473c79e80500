"""Adaption prompts (LLaMA-Adapter): exact names, shapes and bounds against the base."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixd.store.artifact.artifact import inspect_peft, pack_peft, read_artifact
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.kinds import Kind
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import BASE, HIDDEN, config_bytes, ramp, tensors

ADAPTED = replace(BASE, attention_module="model.layers.{}.self_attn")
CONFIG: dict[str, Any] = {
    "num_virtual_tokens": None,
    "adapter_len": 3,
    "adapter_layers": 2,
    "target_modules": "self_attn",
}
Tensors = dict[str, np.ndarray]


def name(layer: int, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.adaption_{part}"


def named(*layers: int) -> Tensors:
    result = {}
    for layer in layers:
        result[name(layer, "gate")] = np.array([0.5 + layer], dtype=np.float32)
        result[name(layer, "prompt")] = ramp(1, 3, HIDDEN) + layer
    return result


def write(folder: Path, content: Tensors, **changes: Any) -> tuple[bytes, Path]:
    weights = folder / "weights"
    weights.write_bytes(tensors(content))
    return config_bytes("ADAPTION_PROMPT", **CONFIG | changes), weights


def test_an_adaption_prompt_is_read_as_it_was_uploaded(tmp_path: Path) -> None:
    config, weights = write(tmp_path, named(1), adapter_layers=1)
    summary = inspect_peft(config, weights, base=ADAPTED)
    assert (summary.kind, summary.num_virtual_tokens) == (Kind.ADAPTION_PROMPT, 3)
    pack_peft(config, weights, tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact", base=ADAPTED, count_tokens=len)
    assert artifact.values is not None
    assert artifact.gates is not None
    assert np.array_equal(artifact.values, ramp(3, HIDDEN) + 1)
    assert artifact.gates.tolist() == [1.5]


def without(part: str) -> Callable[[Tensors], None]:
    def change(content: Tensors) -> None:
        del content[name(0, part)]

    return change


def put(key: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda content: content.__setitem__(key, value.astype(np.float32))


def nothing(_: Tensors) -> None:
    """Change nothing."""


LARGE, NAN = ramp(1, 3, HIDDEN), ramp(1, 3, HIDDEN)
LARGE[0, 2, 5], NAN[0, 1, 4] = 1e30, np.nan
REFUSED: list[tuple[Callable[[Tensors], None], dict[str, Any], str, str]] = [
    (without("gate"), {}, "missing_tensor", "layers.0.self_attn.adaption_gate"),
    (put("base_model.model.lm_head.weight", ramp(2, 2)), {}, "unknown_tensor", "lm_head"),
    (nothing, {"adapter_layers": 1}, "unknown_tensor", "layers.0.self_attn.adaption_gate"),
    (nothing, {"adapter_layers": 3}, "base_mismatch", "has 2 layers"),
    (nothing, {"adapter_layers": 0}, "malformed_config", "adapter_layers to be a whole number"),
    (nothing, {"adapter_len": None}, "malformed_config", "adapter_len to be a whole number"),
    (nothing, {"adapter_len": 65}, "too_many_virtual_tokens", "at most 64"),
    (nothing, {"adapter_len": 4}, "wrong_shape", r"expected \[1, 4, 16\]"),
    (nothing, {"target_modules": "attn"}, "base_mismatch", "attention of the base tiny is self_a"),
    (nothing, {"target_modules": ["self_attn"]}, "base_mismatch", "target_modules an array"),
    (nothing, {"bias": "all"}, "trained_elsewhere", "bias"),
    (put(name(1, "prompt"), ramp(1, 3, 8)), {}, "wrong_shape", r"got \[1, 3, 8\]"),
    (put(name(1, "gate"), ramp(2)), {}, "wrong_shape", r"expected \[1\] \(one gate\)"),
    (put(name(1, "prompt"), LARGE), {}, "out_of_range", "<= 1024 for this base, got about 1e"),
    (put(name(1, "gate"), np.array([-2000])), {}, "out_of_range", "adaption_gate"),
    (put(name(0, "prompt"), NAN), {}, "non_finite", r"\[0, 1, 4\]"),
    (put(name(0, "gate"), np.array([np.inf])), {}, "non_finite", "adaption_gate"),
]


@pytest.mark.parametrize(("change", "config", "code", "message"), REFUSED)
def test_anything_else_is_refused_by_name(
    change: Callable[[Tensors], None],
    config: dict[str, Any],
    code: str,
    message: str,
    tmp_path: Path,
) -> None:
    content = named(0, 1)
    change(content)
    raw, weights = write(tmp_path, content, **config)
    with pytest.raises(ArtifactRefused, match=message) as refused:
        inspect_peft(raw, weights, base=ADAPTED)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (BASE, "adaption_prompt on the base tiny: expected another kind"),
        (
            replace(ADAPTED, refused_kinds={Kind.ADAPTION_PROMPT: "expected a text, since so"}),
            "adaption_prompt on the base tiny: expected a text, since so",
        ),
    ],
)
def test_a_base_without_a_place_for_it_refuses_the_kind(
    base: BaseSpec, message: str, tmp_path: Path
) -> None:
    raw, weights = write(tmp_path, named(0, 1))
    with pytest.raises(ArtifactRefused, match=message) as refused:
        inspect_peft(raw, weights, base=base)
    assert refused.value.code == "unsupported_kind"
