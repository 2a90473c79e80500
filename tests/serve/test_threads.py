"""One thread of the process runs parallel regions: the engine's."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def child_environment(**variables: str) -> dict[str, str]:
    """Without the variables that limit the threads of this run's processes."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    return {**inherited, "PYTHONPATH": str(ROOT), **variables}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_loading_large_prefixes_starts_no_second_pool_of_threads(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.serve.threads_child", str(tmp_path)],
        check=False,
        timeout=240,
        capture_output=True,
        text=True,
        env=child_environment(),
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout.splitlines()[-1])
    assert counts["resident"] == 100
    assert counts["after"] == counts["before"]
    assert counts["after"]["engine"] == 1
    if platform.machine() == "x86_64":  # elsewhere libgomp waits in functions of libc
        assert counts["openmp"] == {"engine": 1}


def test_waiting_threads_spin_within_bounds_before_they_sleep() -> None:
    code = (
        "import os, sys, prefixd.server.engine.step as _; assert 'torch' not in sys.modules;"
        "print(*(os.environ[n] for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    )
    for variables, expected in (({}, "passive 10000"), ({"GOMP_SPINCOUNT": "7"}, "passive 7")):
        process = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
            env=child_environment(**variables),
        )
        assert process.stdout.strip() == expected
