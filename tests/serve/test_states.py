"""What a model whose layers keep a state turns off, and the pool that it needs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from safetensors.torch import save
from structlog.testing import capture_logs

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.serve.build import build_server
from prefixd.server.serve.engine_config import with_states
from prefixd.server.serve.served_model import _refused_kinds
from prefixd.server.serve.settings import Settings
from prefixd.store.artifact.kinds import Kind
from tests.model.tiny_folder import SIZES, save_folder

BASE: Any = SimpleNamespace(
    name="m", layers=SimpleNamespace(states=[SimpleNamespace(kind="Mamba2Mixer")])
)


def test_states_take_blocks_and_the_log_says_what_they_turn_off() -> None:
    config = SchedulerConfig(num_blocks=101, block_size=16, speculate=True)
    with capture_logs() as logs:
        config = with_states(config, BASE, state_blocks=20)
    assert (config.state_blocks, config.max_tokens_for(1)) == (20, (100 - 21 - 20) * 16)
    (line,) = logs
    assert (line["layers"], line["state_blocks"], line["as_much_as_tokens"]) == (
        "Mamba2Mixer",
        20,
        320,
    )
    assert "no KV is reused between requests, and no tokens are proposed" in line["event"]


def test_a_pool_without_room_for_a_sequence_under_a_prefix_is_refused() -> None:
    smallest = SchedulerConfig(num_blocks=1 + 42, block_size=16)
    assert with_states(smallest, BASE, state_blocks=20).max_tokens_for(1) >= 1
    with pytest.raises(UnsupportedModel, match=r"Mamba2Mixer.*at least 672, received 656"):
        with_states(SchedulerConfig(num_blocks=42, block_size=16), BASE, state_blocks=20)


@pytest.mark.parametrize("takes_kv", [True, False])
def test_a_refused_kind_is_not_offered_instead_of_another(takes_kv: bool) -> None:
    base: Any = SimpleNamespace(
        pair=None,
        module=SimpleNamespace(config=SimpleNamespace(model_type="qwen3_next")),
        shape=SimpleNamespace(num_layers=2),
        layers=SimpleNamespace(kv_prefix_refused=lambda _: None if takes_kv else "so"),
    )
    reason = _refused_kinds(Settings(), base)[Kind.ADAPTION_PROMPT]
    assert ("a KV prefix" in reason) is takes_kv


@pytest.mark.slow
def test_a_server_of_a_hybrid_serves_texts_and_refuses_kv_prefixes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        **{**SIZES, "hidden_size": 32},
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    folder = save_folder(transformers.Qwen3_5ForCausalLM(config), tmp_path / "model")
    server = build_server(Settings(model=str(folder), data_dir=tmp_path, kv_tokens=1024, threads=1))
    server.tenants.create_tenant("acme")
    headers = {"Authorization": f"Bearer {server.tenants.create_key(tenant='acme').text}"}
    with TestClient(server.app, headers=headers) as client:
        text = {"kind": "text", "text": "hello"}
        assert client.put("/v1/prefixes/greeting", json=text).status_code == 201
        body = {"model": "greeting", "prompt": "world", "max_tokens": 4, "temperature": 0}
        answers = [client.post("/v1/completions", json=body).json() for _ in range(2)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        refused = client.put("/v1/prefixes/kv", files=kv_prefix_files(num_layers=1, width=16))
    server.tenants._engine.dispose()
    assert refused.status_code in {400, 422}
    error = refused.json()["error"]
    assert error["code"] == "unsupported_kind"
    assert "layers of type Qwen3_5GatedDeltaNet keep a state" in error["message"]


def kv_prefix_files(*, num_layers: int, width: int) -> dict[str, Any]:
    """The parts of an upload of a PEFT KV prefix of 4 virtual tokens."""
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
        "token_dim": width,
        "num_layers": num_layers,
        "num_attention_heads": 1,
        "prefix_projection": False,
        "inference_mode": True,
    }
    values = {"prompt_embeddings": torch.zeros(4, 2 * num_layers * width)}
    return {
        "config": ("adapter_config.json", json.dumps(config)),
        "weights": ("adapter_model.safetensors", save(values)),
    }
