"""No secret, prompt, text or tensor value in logs, metrics or errors, at the chattiest level."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.canary_scenario import PROMPT, SECRET, TENSOR, TEXT, USER

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_canary_gets_out(form: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("canary_scenario.py")), form],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # It went through what it meant to go through, and the log saw it.
    assert set(found["statuses"]) == {200, 201, 400, 401, 422, 500}
    assert "request failed" in done.stderr
    assert done.stderr.count("/v1/completions") >= 10
    errors = "\n".join(found["errors"])
    places = {"log": done.stderr, "metrics": found["metrics"], "errors": errors}
    for place, text in places.items():
        for canary in (PROMPT, TEXT, USER, SECRET, str(TENSOR)[:7], *found["keys"]):
            assert canary not in text, f"{canary} in the {place}"
