"""Servers that run batches are killed at random moments: every line gets one answer."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SEED = os.environ.get("PREFIXD_KILL_SEED") or secrets.token_hex(4)
KILLS = 30


def test_no_line_is_lost_or_answered_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.batch_kills", str(tmp_path), SEED, str(KILLS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"PREFIXD_KILL_SEED={SEED}\n{ended.stderr[-4000:]}"
    report = json.loads(ended.stdout)
    assert report["kills"] >= KILLS
    assert report["batches"] >= 1
