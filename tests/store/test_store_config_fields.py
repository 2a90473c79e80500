"""Fields and sizes of ``adapter_config.json``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixd.store.artifact.artifact import inspect_peft, pack_peft, read_artifact
from prefixd.store.artifact.config import MAX_CONFIG_BYTES, TRAINED_ELSEWHERE
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import BASE, HIDDEN, config_bytes, soft, spool


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", [3, 4]),
        ("trainable_token_indices", {"embed_tokens": [3]}),
        ("target_modules", ["q_proj"]),
        ("target_parameters", ["experts.weight"]),
        ("layers_to_transform", 0),
        ("layers_to_transform", [1]),
        ("layers_pattern", "layers"),
        ("layer_replication", [[0, 2]]),
        ("bias", "all"),
    ],
)
@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_config_that_names_weights_outside_the_prefix_is_refused(
    tmp_path: Path, peft_type: str, field: str, value: Any
) -> None:
    with pytest.raises(ArtifactRefused, match=f"expected {field} to be null") as refusal:
        inspect_peft(config_bytes(peft_type, **{field: value}), tmp_path / "unread", base=BASE)
    assert (refusal.value.code, refusal.value.param) == ("trained_elsewhere", field)
    assert "not in the prefix's tensors" in refusal.value.message


@pytest.mark.parametrize("value", [None, [], {}, "", False])
def test_empty_fields_and_those_of_peft_itself_are_accepted(tmp_path: Path, value: Any) -> None:
    empty = dict.fromkeys(TRAINED_ELSEWHERE, value)
    harmless = {"bias": "none", "inference_mode": True, "prefix_projection": True}
    config = config_bytes(**empty | harmless)
    assert inspect_peft(config, spool(tmp_path, soft()), base=BASE).num_virtual_tokens == 4


def cpt_config(count: int) -> bytes:
    """A CPT config of ``count`` tokens in the layout of PEFT's ``save_pretrained``."""
    fields = {
        "peft_type": "CPT",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": count,
        "cpt_token_ids": [50_000 + i for i in range(count)],
        "cpt_mask": [1] * count,
        "cpt_tokens_type_mask": [1 + i % 4 for i in range(count)],
    }
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def test_a_cpt_config_of_200_kb_is_stored_and_read_back(tmp_path: Path) -> None:
    count = 8000
    config = cpt_config(count)
    assert 200_000 < len(config) < MAX_CONFIG_BYTES
    base = replace(BASE, max_virtual_tokens=count)
    weights = spool(tmp_path, soft(np.ones((count, HIDDEN), dtype=np.float32)))
    assert inspect_peft(config, weights, base=base).num_virtual_tokens == count
    pack_peft(config, weights, tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact", base=base, count_tokens=len)
    assert artifact.values is not None
    assert artifact.values.shape == (count, HIDDEN)


def test_a_config_over_256_kib_is_refused_with_limit_and_size(tmp_path: Path) -> None:
    config = config_bytes()
    exact = config + b" " * (MAX_CONFIG_BYTES - len(config))
    weights = spool(tmp_path, soft())
    assert inspect_peft(exact, weights, base=BASE).num_virtual_tokens == 4
    with pytest.raises(ArtifactRefused, match="at most 262144 bytes, got 262145") as refusal:
        inspect_peft(exact + b" ", weights, base=BASE)
    assert refusal.value.code == "malformed_config"
