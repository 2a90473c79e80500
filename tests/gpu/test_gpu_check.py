"""`make gpu-check` itself, as far as a machine without a GPU can tell."""

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
"""What a machine with torch, transformers, peft and pytest has not."""

FORGET = f"import sys\n\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"


def bare_machine(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run check's pytest where the absent cannot be imported."""
    (folder / "bare_machine.py").write_text(FORGET)
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


def test_what_it_runs_needs_no_server_and_no_database(tmp_path: Path) -> None:
    found = bare_machine(tmp_path, "--collect-only", "-qq")
    assert found.returncode == 0, found.stdout
    rooms = {line.split("/")[1] for line in found.stdout.splitlines() if line.startswith("tests/")}
    assert rooms == {"golden", "engine", "machines", "model"}
    ran = bare_machine(tmp_path, "-k", "test_a_nan_prefix or test_engine")
    assert ran.returncode == 0, ran.stdout


def test_the_throughput_it_would_measure(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["check.py"])
    assert check.main() == 0
    assert "skipped, torch sees no CUDA device here" in capsys.readouterr().out
