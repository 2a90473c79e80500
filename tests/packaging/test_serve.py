"""The wheel with the packages of its extras serves from any working folder."""

import ast
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.faults.faults_model import save_model
from tests.packaging.wheel import Environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READY_WITHIN_S = 120


def test_modules_come_from_the_wheel(complete: Environment) -> None:
    # prefixd-cpu, a portion of the same namespace package, may come from the environment of torch.
    code = (
        "import prefixd.client as client, prefixd.store as store, prefixd.server as server\n"
        "print([list(room.__path__)[0] for room in (client, store, server)])"
    )
    result = complete.run("python", "-c", code)
    assert result.returncode == 0, result.stderr
    folders = ast.literal_eval(result.stdout)
    assert [Path(folder).is_relative_to(complete.folder) for folder in folders] == [True] * 3


def test_serve_answers_and_ends_on_sigterm(complete: Environment, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"PREFIXD_DATA_DIR": str(tmp_path / "data")}
    created = complete.run("prefixd", "tenant", "create", "acme", **settings)
    assert created.returncode == 0, created.stderr
    issued = complete.run("prefixd", "key", "create", "--tenant", "acme", "--json", **settings)
    key = json.loads(issued.stdout)["key"]
    model = save_model(tmp_path / "model")
    command = ["serve", "--model", str(model), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        [complete.folder / "bin" / "prefixd", *command, "--log-format", "json"],
        cwd=complete.workplace,
        env=complete.variables(**settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = served_url(process)
            headers = {"Authorization": f"Bearer {key}"}
            with httpx2.Client(base_url=url, headers=headers, timeout=READY_WITHIN_S) as client:
                wait_until_ready(client)
                body = {"model": client.get("/v1/models").json()["data"][0]["id"], "prompt": "w5"}
                completion = client.post("/v1/completions", json=body | {"max_tokens": 3})
            assert completion.status_code == 200, completion.text
            assert completion.json()["usage"]["completion_tokens"] == 3
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=READY_WITHIN_S)
            assert process.returncode == 0, log
        finally:
            process.kill()


@pytest.mark.demo_model
def test_demo_runs_from_the_wheel_and_converts_reproducibly(
    complete: Environment, tmp_path: Path
) -> None:
    arguments = ("demo", "--once", "--port", "0", "--data-dir", str(tmp_path))
    result = complete.run("prefixd", *arguments, timeout=540)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "distinct prefixes" in result.stdout
    cached = demo_model(default_cache_dir())
    [converted] = (tmp_path / "models").iterdir()  # half a gigabyte that pytest would keep
    weights = (converted / "model.safetensors").read_bytes()
    assert weights == (cached / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "models")


def served_url(process: subprocess.Popen[str]) -> str:
    """The address in the event ``serving`` of the log, of which each line must be JSON; fails with
    the log itself when the process ends."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("{") and (event := json.loads(line))["event"] == "serving":
            assert [each for each in lines if not each.startswith("{")] == []  # no progress bar
            return str(event["url"])
    raise AssertionError("".join(lines))


def wait_until_ready(client: httpx2.Client) -> None:
    """Poll ``/health/ready``: its socket may not listen yet."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx2.ConnectError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready within {READY_WITHIN_S} s")
