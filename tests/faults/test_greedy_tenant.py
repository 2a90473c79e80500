"""A tenant that creates as much as it may meets its quotas; what another tenant notices of it.

The other tenant's latencies are compared with those of quiet rounds, which alternate with the loud
ones; the step time of the fake runner is fixed, and the two tenants have different addresses.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.faults.faults_outage import within

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

CLIENTS, ROUNDS, CALLS, STEP_S = 24, 3, 20, 0.005
ALLOWED_S = 0.05
QUOTAS = {
    "max_users": 12,
    "max_aliases": 10,
    "max_keys": 16,
    "max_versions": 12,
    "max_idempotency_keys": 10,
}


@contextmanager
def child(module: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A child process that ends when its standard input does."""
    command = [sys.executable, "-m", f"tests.faults.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0


def read_line(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def p99(call: Callable[[], httpx2.Response]) -> float:
    """The 99th percentile of the seconds of CALLS calls, one after another."""
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        response = call()
        seconds.append(time.perf_counter() - start)
        assert response.status_code == 200, response.text
    return sorted(seconds)[-1 - CALLS // 100]


def test_a_tenant_that_creates_as_much_as_it_may_meets_its_quotas(
    tmp_path: Path,
) -> None:
    with child("fake_child", str(tmp_path), str(STEP_S)) as server:
        assert server.stdin is not None
        server.stdin.write(json.dumps(QUOTAS) + "\n")
        server.stdin.flush()
        ready = read_line(server)
        url, keys = f"http://127.0.0.1:{ready['port']}", ready["keys"]
        beta = {"authorization": f"Bearer {keys['beta']}"}
        acme = {"authorization": f"Bearer {keys['acme']}"}
        address = httpx2.HTTPTransport(local_address="127.0.0.2")
        with httpx2.Client(base_url=url, headers=beta, timeout=60, transport=address) as http:
            text = {"kind": "text", "text": "one"}
            for number in range(5):
                http.put(f"/v1/prefixes/p{number}", json=text).raise_for_status()
            http.put("/v1/prefixes/same", json=text, headers=acme).raise_for_status()
            body = {"model": "p1", "prompt": "Hi", "max_tokens": 4}
            calls = {
                "list": lambda: http.get("/v1/prefixes"),
                "generation": lambda: http.post("/v1/completions", json=body),
            }
            quiet: dict[str, list[float]] = {kind: [] for kind in calls}
            loud: dict[str, list[float]] = {kind: [] for kind in calls}
            for round_number in range(ROUNDS):
                for kind, call in calls.items():
                    quiet[kind].append(p99(call))
                with child("greedy_child", url, keys["acme:all"], str(CLIENTS)) as greedy:
                    refused = [read_line(greedy)["refused"] for _ in QUOTAS]
                    for kind, call in calls.items():
                        loud[kind].append(p99(call))
                    assert greedy.stdin is not None
                    greedy.stdin.close()
                    responses = read_line(greedy)
                assert sum(responses.values()) > CLIENTS, round_number
                assert not any(" 5" in kind for kind in responses), responses
                for quota, limit in QUOTAS.items():
                    (message,) = [found for found in refused if f"({quota})" in found]
                    assert f"the tenant may have {limit} " in message
                    assert responses[f"{quota} 429 insufficient_quota"] >= 1
            admin = {"authorization": f"Bearer {keys['acme:all']}"}
            used = http.get("/v1/admin/tenants/acme", headers=admin).json()["used"]
            assert {quota: used[quota] for quota in QUOTAS} == QUOTAS
    figures = {
        kind: (statistics.median(quiet[kind]), statistics.median(loud[kind])) for kind in calls
    }
    print({kind: tuple(round(1000 * s, 1) for s in pair) for kind, pair in figures.items()})
    for kind, (quiet_s, loud_s) in figures.items():
        assert loud_s <= max(2 * quiet_s, quiet_s + within(ALLOWED_S)), (kind, figures)
