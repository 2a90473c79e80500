"""A server with ``quantize``: what it shows, shares with one without, and refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi.testclient import TestClient

from prefixd.server.cli.serve import load_server
from prefixd.server.model import decoders
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.serve.build import Server, build_server
from prefixd.server.serve.loading import kv_namespace
from prefixd.server.serve.settings import Settings
from tests.api.api_world import put_text
from tests.model.cpu.native_library import native_library
from tests.model.tiny_folder import save_folder, tiny_llama

PROMPT = "a prompt of more than two blocks, so that some are shared"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(hidden_size=32, intermediate_size=48)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4.0)
    return save_folder(model, tmp_path_factory.mktemp("model"))


@pytest.fixture
def servers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, tuple[Server, TestClient]]]:
    """One server after the other over the same data folder, by the value of ``quantize``."""
    library = native_library()
    monkeypatch.setattr(decoders, "find_or_compile_library", lambda _folder: library)
    made = {}
    for quantize in ("none", "int8"):
        server = build_server(settings(folder, tmp_path, quantize=quantize))
        if quantize == "none":
            server.tenants.create_tenant("acme")
        headers = {"Authorization": f"Bearer {server.tenants.create_key(tenant='acme').text}"}
        made[quantize] = (server, TestClient(server.app, headers=headers))
    with made["none"][1], made["int8"][1]:
        yield made
    for server, _ in made.values():
        server.tenants._engine.dispose()


def settings(folder: Path, data_dir: Path, **values: Any) -> Settings:
    return Settings(model=str(folder), data_dir=data_dir, kv_tokens=1024, threads=1, **values)


@pytest.mark.slow
def test_int8_serves_the_prefixes_of_the_same_base_with_kv_of_its_own(
    servers: dict[str, tuple[Server, TestClient]],
) -> None:
    (plain, client), (rounded, other) = servers["none"], servers["int8"]
    assert rounded.served.base == plain.served.base, "one fingerprint, the same bounds"
    manifest = put_text(client, "dog", "You are a dog.", dict(client.headers))
    assert other.get("/v1/prefixes/dog").json()["digest"] == manifest["digest"]
    answers: dict[str, list[Any]] = {}
    for name, (_, each) in servers.items():
        for _ in range(2):  # the second time, KV is reused
            body = {"model": "dog", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = each.post("/v1/completions", json=body | {"logprobs": 1, "ignore_eos": True})
            assert answer.status_code == 200, answer.text
            answers.setdefault(name, []).append(answer.json()["choices"][0]["logprobs"])
    assert answers["none"] != answers["int8"]
    for name, (server, _) in servers.items():
        assert answers[name][0] == answers[name][1]
        assert server.engine.stats().kv_reused_tokens > 0
    pools = [server.engine.core.scheduler.memory.pool for server, _ in servers.values()]
    names = [set(pool._blocks) for pool in pools]
    assert all(names)
    assert not names[0] & names[1], "a block of the one has no name that the other looks up"


@pytest.mark.slow
def test_health_and_metrics_show_what_int8_costs(
    servers: dict[str, tuple[Server, TestClient]],
) -> None:
    shown = servers["int8"][1].get("/health/ready").json()["decoder"]
    assert shown["quantize"] == "int8"
    assert shown["kernels"] in KERNELS
    assert 0.9 < shown["perplexity_ratio"] < 1.1
    assert 0.8 <= shown["top1_agreement"] <= 1
    labels = {name: str(value) for name, value in shown.items()} | {
        "tensor_parallel": "",
        "weights": "",
    }
    registry = servers["int8"][0].metrics.registry
    assert registry.get_sample_value("prefixd_decoder_info", labels) == 1
    plain = servers["none"][1].get("/health/ready").json()["decoder"]
    assert set(plain) == {"kernels", "device", "dtype", "quantize"}
    assert plain["quantize"] == "none"


def test_kv_is_named_after_what_it_depends_on(tmp_path: Path) -> None:
    names = {
        kv_namespace("f1", Settings(data_dir=tmp_path, dtype=dtype, quantize=quantize))
        for dtype in ("float32", "bfloat16")
        for quantize in ("none", "int8")
    }
    assert len(names) == 4
    assert kv_namespace("f1", Settings(data_dir=tmp_path)) == "f1:float32"
    assert "f1:bfloat16:int8" in names


@pytest.mark.parametrize("kernels", ["module", "torch"])
def test_int8_without_native_kernels_ends_the_start_with_the_reason(
    kernels: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        load_server(settings(folder, tmp_path, quantize="int8", cpu_kernels=kernels))
    assert f"quantize is int8 and cpu_kernels is {kernels}" in capsys.readouterr().err
