"""The parts of `make gpu-check` that can be tested without a GPU."""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.gpu import check

ABSENT = (
    *("alembic", "fastapi", "gguf", "httptools", "moto", "multipart", "obstore"),
    *("openai", "opentelemetry", "psycopg", "pydantic", "pydantic_settings", "sqlalchemy"),
    *("starlette", "structlog", "uvicorn"),
)
"""Packages that a machine with only torch, transformers, peft and pytest lacks."""

HIDE_ABSENT = f"import sys\n\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"


def bare_machine(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the pytest command of ``check`` where the ABSENT packages cannot be imported."""
    (folder / "bare_machine.py").write_text(HIDE_ABSENT)
    command, environment = check.pytest_call("cpu")
    environment["PYTHONPATH"] += f":{folder}"
    return subprocess.run(
        [*command, "-p", "bare_machine", *more],
        cwd=check.ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_gpu_check_runs_without_server_and_database_packages(tmp_path: Path) -> None:
    collected = bare_machine(tmp_path, "--collect-only", "-qq")
    assert collected.returncode == 0, collected.stdout
    rooms = {
        line.split("/")[1] for line in collected.stdout.splitlines() if line.startswith("tests/")
    }
    assert rooms == {"golden", "engine", "machines", "model"}
    run = bare_machine(tmp_path, "-k", "test_a_prefix_with_nan or test_engine")
    assert run.returncode == 0, run.stdout


def test_gpu_check_measures_throughput_of_base_and_mixed_prefixes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "OUTPUT", 4)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    figures = check.throughput(LlamaForCausalLM(config), device="cpu")
    assert list(figures) == [
        *("bfloat16, base", "bfloat16, 32 soft prompts"),
        *("float32, base", "float32, 32 soft prompts"),
    ]
    assert all(figure > 0 for figure in figures.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_prints_a_message_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["check.py"])
    assert check.main() == 0
    assert "skipped, torch finds no CUDA device" in capsys.readouterr().out
