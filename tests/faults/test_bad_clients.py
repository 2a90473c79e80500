"""A thousand bad clients of each kind at once: a good client notices little, and nothing leaks.

``make clients`` measures three alternating rounds and prints the table of benchmarks/NOTES.md.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.testing import fake_generate
from tests.faults.bad_clients import KINDS
from tests.faults.faults_outage import (
    LIVE_WITHIN_S,
    SLACK,
    HealthProber,
    check_recovers,
    wait_until,
    within,
)

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("PREFIXD_TEST_CLIENT_ROUNDS", "1"))
REQUESTS = 30
"""Of the good client, in each round and state."""

COUNT, TOKENS = 1000, 8
DESCRIPTORS = 4096
GROWTH_BYTES, LOG_BYTES = 100e6, 1e6
ADDED_S = 0.05


@dataclass
class Served:
    """A server process. ``log`` is its standard error."""

    process: "subprocess.Popen[str]"
    log: Path
    port: int
    keys: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def sample(self, name: str) -> float:
        """The sum of a metric's series."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name
        )

    def is_idle(self) -> bool:
        """Whether no sequence runs or waits."""
        names = ("prefixd_num_requests_running", "prefixd_num_requests_waiting")
        return not any(self.sample(name) for name in names)

    def generate(self, http: httpx2.Client, tokens: int = TOKENS) -> float:
        """Stream a completion and check its text; its seconds."""
        body = {"model": "tiny", "prompt": "hello", "max_tokens": tokens, "stream": True}
        start, text = time.perf_counter(), ""
        with http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        assert text == bytes(fake_generate(None, list(b"hello"), tokens)).decode()
        return time.perf_counter() - start


@contextmanager
def served(folder: Path, *, descriptors: int, connections: int = 0) -> Iterator[Served]:
    """A server with ``descriptors``, in its own process."""
    folder.mkdir()
    log = folder / "log"
    command = [sys.executable, "-m", "tests.faults.clients_child", str(folder)]
    with log.open("w") as errors:
        process = _start([*command, str(descriptors), str(connections)], errors)
    with _ended(process):
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        server = Served(process, log, ready["port"], ready["keys"])
        wait_until(lambda: _is_live(server.url), timeout_s=30)
        yield server


@contextmanager
def bad_clients(kind: str, server: Served) -> Iterator[None]:
    """COUNT bad clients, each of which has connected at the start of the block."""
    module = [sys.executable, "-m", "tests.faults.bad_clients"]
    process = _start([*module, kind, str(COUNT), str(server.port), server.keys["beta"]], None)
    with _ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        yield


def _start(command: list[str], errors: Any) -> "subprocess.Popen[str]":
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment
    )


@contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    with process:
        try:
            yield
        finally:
            process.kill()


def _is_live(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health/live", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


@dataclass
class Figures:
    """Of one kind: 99th percentiles in seconds of each round, and what grew, in bytes: ``log`` in
    one round."""

    quiet: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    memory: int = 0
    log: int = 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("clients") / "data", descriptors=DESCRIPTORS) as server:
        with httpx2.Client(base_url=server.url, headers=_key(server), timeout=30) as http:
            p99(server, http)
        yield server


def _key(server: Served) -> dict[str, str]:
    return {"authorization": f"Bearer {server.keys['acme']}"}


def p99(server: Served, http: httpx2.Client) -> float:
    """The 99th percentile of the good client's requests, in seconds."""
    seconds = sorted(server.generate(http) for _ in range(REQUESTS))
    return seconds[int(0.99 * (REQUESTS - 1))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_bad_clients_leave_a_good_one_its_time(server: Served, kind: str) -> None:
    figures, probers = Figures(), list[HealthProber]()
    memory, log = server.memory, server.log.stat().st_size
    with httpx2.Client(base_url=server.url, headers=_key(server), timeout=30) as http:
        for _ in range(ROUNDS):
            figures.quiet.append(p99(server, http))
            with HealthProber(server.url) as health, bad_clients(kind, server):
                # What stalled readers asked for is ready; it is theirs to read.
                wait_until(server.is_idle, timeout_s=within(30))
                figures.attacked.append(p99(server, http))
                figures.memory = max(figures.memory, server.memory - memory)
            probers.append(health)
        # Nothing remains of the bad clients: no connection, no sequence.
        wait_until(lambda: server.sample("prefixd_connections") <= 2, timeout_s=within(10))
        wait_until(server.is_idle, timeout_s=within(10))
    figures.log = (server.log.stat().st_size - log) // ROUNDS
    quiet, attacked = statistics.median(figures.quiet), statistics.median(figures.attacked)
    print(
        f"\n| {kind} | {quiet * 1e3:.0f} ms | {attacked * 1e3:.0f} ms | "
        f"{figures.memory / 1e6:.1f} MB | {figures.log / 1e3:.0f} kB |"
    )
    for health in probers:
        health.check_live()
    assert attacked <= max(2 * quiet * SLACK, quiet + ADDED_S * SLACK)
    assert figures.memory < GROWTH_BYTES
    assert figures.log < LOG_BYTES
    assert "Traceback" not in server.log.read_text()


FEW_DESCRIPTORS = 256


def test_idle_connections_from_many_addresses_leave_room_for_health_checks(
    tmp_path: Path,
) -> None:
    """With 256 descriptors and the default limits."""
    with (
        served(tmp_path / "data", descriptors=FEW_DESCRIPTORS) as server,
        httpx2.Client(base_url=server.url, headers=_key(server), timeout=30) as http,
    ):
        with HealthProber(server.url) as health, bad_clients("idle", server):
            server.generate(http)
        health.check_live()
        assert server.sample("prefixd_connections_evicted_total") > 0
        assert server.sample("prefixd_accept_failures_total") == 0
        assert server.log.stat().st_size < LOG_BYTES


def test_without_descriptors_running_streams_go_on_and_the_log_stays_small(
    tmp_path: Path,
) -> None:
    """The limit of connections is above that of descriptors, so that accepting fails."""
    with (
        served(tmp_path / "data", descriptors=FEW_DESCRIPTORS, connections=100_000) as server,
        httpx2.Client(base_url=server.url, headers=_key(server), timeout=30) as http,
    ):
        server.generate(http)
        with bad_clients("idle", server):
            start = time.monotonic()
            assert http.get("/health/live").status_code == 200  # on its open connection
            assert time.monotonic() - start < within(LIVE_WITHIN_S)
            server.generate(http, tokens=100)
        check_recovers(lambda: _check_live(server.url))
        check_recovers(lambda: _check_few(server))
        assert server.sample("prefixd_accept_failures_total") > 1
        log = server.log.read_text()
        assert "cannot accept connections" in log
        assert "Traceback" not in log
        assert len(log) < LOG_BYTES


def _check_live(url: str) -> None:
    assert _is_live(url)


def _check_few(server: Served) -> None:
    assert server.sample("prefixd_connections") <= 2
