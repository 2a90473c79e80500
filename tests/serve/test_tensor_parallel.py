"""A server with ``tensor_parallel``: what it refuses, shows, and how it and its followers end."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer

from prefixd.client import Client
from prefixd.server.cli.demo.child import admin
from prefixd.server.cli.serve import load_server
from prefixd.server.model.parallel.plan import ParallelRefused
from prefixd.server.serve import checks, loading
from prefixd.server.serve.engine_config import scheduler_config
from prefixd.server.serve.settings import Settings
from tests.faults.faults_process import KillableServer
from tests.model.tiny_folder import save_folder, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(num_key_value_heads=2, max_position_embeddings=2048)
    return save_folder(model, tmp_path_factory.mktemp("model"))


def settings(folder: Path, data_dir: Path, **values: Any) -> Settings:
    return Settings(model=str(folder), data_dir=data_dir, kv_tokens=1024, **values)


def test_a_start_that_cannot_succeed_ends_before_processes_start(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loading, "Followers", None)
    for values, expected in (
        ({"tensor_parallel": 3}, "llama has 2 KV heads, which 3 ranks cannot share evenly"),
        ({"tensor_parallel": 2, "quantize": "int8"}, "quantize is int8; expected none"),
        ({"tensor_parallel": 2, "cpu_kernels": "torch"}, "expected auto or module"),
    ):
        with pytest.raises(typer.Exit):
            load_server(settings(folder, tmp_path, **values))
        assert expected in capsys.readouterr().err


def test_int8_is_not_offered_where_a_start_would_refuse_it(folder: Path, tmp_path: Path) -> None:
    chosen = settings(folder, tmp_path, tensor_parallel=2)
    expected = "a start would fail: tensor_parallel is 2 and quantize is int8; expected none"
    assert expected in checks.check_int8(chosen, device="cpu")
    with pytest.raises(ParallelRefused):
        checks.check_int8(chosen.model_copy(update={"quantize": "int8"}), device="cpu")


def test_ranks_on_one_cpu_share_its_threads(folder: Path, tmp_path: Path) -> None:
    chosen = settings(folder, tmp_path, tensor_parallel=2, block_size=4)
    config = scheduler_config(chosen)
    threads = {
        (device, count): loading._job(chosen, config, device=device, threads=count).threads
        for device in ("cpu", "cuda")
        for count in (1, 5)
    }
    assert threads == {("cpu", 1): 1, ("cpu", 5): 2, ("cuda", 1): 1, ("cuda", 5): 5}
    job = loading._job(chosen, config, device="cpu", threads=1)
    assert job.pool_tokens == loading.pool_tokens(config) == 1024


@pytest.mark.slow
def test_a_killed_follower_ends_the_server_with_its_name(folder: Path, tmp_path: Path) -> None:
    admin(tmp_path, "tenant", "create", "acme")
    key = admin(tmp_path, "key", "create", "--tenant", "acme")
    assert isinstance(key, dict)
    flags = ("--tensor-parallel", "2", "--kv-tokens", "4096", "--watchdog", "30")
    with KillableServer(data_dir=tmp_path, model=folder, flags=flags) as server:
        url = server.ready()
        follower = int(re.findall(r"rank 1 of 2 is process (\d+)", server.log.read_text())[0])
        assert follower in server.family
        for sent in (signal.SIGTERM, signal.SIGINT):  # what ends a server may be sent to all of it
            os.kill(follower, sent)
        facts = httpx2.get(f"{url}/health/ready").json()["decoder"]
        assert facts["tensor_parallel"] == 2
        assert facts["kernels"] == "module"
        assert 'tensor_parallel="2"' in httpx2.get(f"{url}/metrics").text
        with Client(url, api_key=str(key["key"])) as client:
            client.upload_text("dog", "You are a dog.")
        body = {"model": "dog", "prompt": "Hello", "temperature": 0, "ignore_eos": True}
        with httpx2.stream(
            "POST",
            f"{url}/v1/completions",
            json={**body, "max_tokens": 1900, "stream": True},
            headers={"authorization": f"Bearer {key['key']}"},
            timeout=60,
        ) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert '"text"' in next(lines)
            os.kill(follower, signal.SIGKILL)
            assert not [line for line in lines if '"finish_reason":"length"' in line]
        assert server.ended(limit=60) == 1
        assert "cannot be run any more: rank 1 was killed by signal 9" in server.log.read_text()
        assert server.family == []
