"""No secret, prompt, text or tensor value in logs, metrics or errors, at the most verbose level."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.canary_scenario import PROMPT, SECRET, TENSOR, TEXT, USER

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["json", "console"])
def test_logs_metrics_and_errors_contain_no_secret_or_prompt(form: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("canary_scenario.py")), form],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert not output["torch"], "the tests of the API import torch, which takes most of their time"
    # The scenario reached all its paths, and the log recorded them.
    assert set(output["statuses"]) == {200, 201, 400, 401, 422, 500}
    assert "request failed" in done.stderr
    assert done.stderr.count("/v1/completions") >= 10
    errors = "\n".join(output["errors"])
    outputs = {"log": done.stderr, "metrics": output["metrics"], "errors": errors}
    for name, text in outputs.items():
        for canary in (PROMPT, TEXT, USER, SECRET, str(TENSOR)[:7], *output["keys"]):
            assert canary not in text, f"{canary} in the {name}"
