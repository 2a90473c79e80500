"""The parts of `make gpu-check` that can be tested without a GPU."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import check
from tests.gpu.check import Part

ABSENT = (
    *("alembic", "fastapi", "gguf", "httptools", "moto", "multipart", "obstore"),
    *("openai", "opentelemetry", "psycopg", "pydantic", "pydantic_settings", "sqlalchemy"),
    *("starlette", "structlog", "uvicorn"),
)
"""Packages that a machine with only torch, transformers, peft and pytest lacks."""

HIDE_ABSENT = f"import sys\n\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
PLUGINS = ("timeout", "xdist", "anyio", "pytest_cov")


def bare_machine(part: Part, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the pytest command of a part where the ABSENT packages cannot be imported."""
    (folder / "bare_machine.py").write_text(HIDE_ABSENT)
    command, environment = check.pytest_call(part, "cpu")
    environment["PYTHONPATH"] += f":{folder}"
    hidden = [option for plugin in PLUGINS for option in ("-p", f"no:{plugin}")]
    return subprocess.run(
        [*command, "-p", "bare_machine", *hidden, *more],
        cwd=check.ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_part_is_collected_without_server_and_database_packages(tmp_path: Path) -> None:
    files = tuple(dict.fromkeys(file for part in check.PARTS for file in part.files))
    collected = bare_machine(Part("all", files), tmp_path, "--collect-only", "-qq")
    assert collected.returncode == 0, collected.stdout + collected.stderr
    lines = collected.stdout.splitlines()
    assert {line.partition(":")[0] for line in lines if line.startswith("tests/")} == set(files)


@pytest.mark.slow
def test_a_part_runs_without_server_and_database_packages(tmp_path: Path) -> None:
    part = Part("golden", ("tests/golden/test_golden_mixed.py",), "test_a_prefix_with_nan")
    run = bare_machine(part, tmp_path)
    assert run.returncode == 0, run.stdout


def run_parts(*parts: Part, budget: float = 500) -> dict[str, Mapping[str, Any]]:
    results: dict[str, Mapping[str, Any]] = {}
    check.run_parts(parts, device="cpu", jobs=2, budget=budget, ended=results.__setitem__)
    return results


def test_a_failed_part_stops_no_other_and_its_first_failure_is_reported(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "def test_right():\n    pass\n\n\ndef test_wrong():\n    assert 1 == 2, 'bits differ'\n"
    )
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module\n")
    results = run_parts(Part("both", (str(tests),)), Part("broken", (str(broken),)))
    statuses = {name: each["status"] for name, each in results.items()}
    assert statuses == {"both": "failed (1)", "broken": "failed (2)"}
    assert (results["both"]["tests"], results["both"]["failures"]) == (2, 1)
    assert "test_wrong: AssertionError: bits differ" in results["both"]["first_failure"]
    assert "no_such_module" in results["broken"]["first_failure"]


def test_a_part_that_hangs_is_ended_and_later_ones_are_left_out(tmp_path: Path) -> None:
    tests = tmp_path / "test_hangs.py"
    tests.write_text("import threading\n\n\ndef test_hangs():\n    threading.Event().wait()\n")
    part = Part("hangs", (str(tests),))
    result = check.run_part(part, device="cpu", timeout=2)
    assert result["status"] == "ran out of time"
    assert "last_output" in result
    assert run_parts(part, budget=5) == {"hangs": {"status": "left out", "seconds": 0.0}}


def test_the_parts_of_the_kernels_are_all_of_their_tests() -> None:
    selects = [part.select for part in check.PARTS if part.files == check.KERNELS]
    assert sorted(selects) == ["bfloat16", "float16 and not bfloat16", "not float16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_prints_a_message_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["check.py"])
    assert check.main() == 0
    assert "skipped, torch finds no CUDA device" in capsys.readouterr().out
