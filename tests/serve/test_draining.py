"""SIGTERM on a real process: requests finish or get an error, and the exit status is 0."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.serve.shutdown import CLOSING_S
from tests.faults.faults_injections import open_upload

pytestmark = pytest.mark.slow  # each test starts a server process and waits for its end

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("draining_child.py")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A fake stream of 300 steps at this rate takes longer than every test here.
SLOW_STEP_S = 0.1
SOON_S = 20
"""Less than the drain timeout or the stream that a test cuts short, of 30 seconds each."""


class Served:
    """A server in a child process, and a client of it."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.log = log
        self._stdout = process.stdout
        ready = json.loads(self._stdout.readline())
        url = f"http://127.0.0.1:{ready['port']}"
        self.url, self.key = url, ready["key"]
        headers = {"authorization": f"Bearer {self.key}"}
        self.client = httpx2.Client(base_url=url, headers=headers, timeout=60)
        while True:
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return
            except httpx2.ConnectError:
                assert process.poll() is None

    @contextmanager
    def stream(self, max_tokens: int) -> Iterator[Iterator[str]]:
        """The lines of a stream that has begun."""
        body = {"model": "tiny", "prompt": "x", "max_tokens": max_tokens, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            yield lines

    def ended(self) -> list[str]:
        """Wait for the end, with status 0 and no remaining thread; the log's lines."""
        assert self.process.wait(60) == 0, self.log.read_text()
        last = json.loads(self._stdout.readline())
        assert last["threads"] == []
        return self.log.read_text().splitlines()


@contextmanager
def served(
    folder: Path, *, drain_timeout: float, step_s: float = 0.0, closing_s: int = CLOSING_S
) -> Iterator[Served]:
    log = folder / "log"
    numbers = map(str, (drain_timeout, step_s, closing_s))
    command = [sys.executable, str(CHILD), str(folder), *numbers]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            server = Served(process, log)
            with closing(server.client):
                yield server
        finally:
            process.kill()


class PendingRequest(threading.Thread):
    """A completion that runs in a thread; ``response`` once it has ended."""

    response: httpx2.Response

    def __init__(self, client: httpx2.Client, body: dict[str, Any]) -> None:
        super().__init__()
        self._client = client
        self._body = body
        self.start()

    def run(self) -> None:
        self.response = self._client.post("/v1/completions", json=self._body)


def error_in(line: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(line.removeprefix("data: "))["error"]
    return error


@pytest.mark.parametrize("sig", SIGNALS)
def test_an_idle_server_exits_immediately(tmp_path: Path, sig: signal.Signals) -> None:
    with served(tmp_path, drain_timeout=30) as server:
        started = time.monotonic()
        server.process.send_signal(sig)
        log = server.ended()
    assert time.monotonic() - started < SOON_S
    assert any('"draining"' in line for line in log)
    assert any('"stopped"' in line for line in log)


def test_a_stream_that_ends_within_the_drain_timeout_is_complete(tmp_path: Path) -> None:
    with served(tmp_path, drain_timeout=60, step_s=SLOW_STEP_S) as server:
        # The server drains for as long as the test needs, however long the stream takes.
        with server.stream(10) as lines, open_upload(server.url, server.key):
            server.process.send_signal(signal.SIGTERM)
            rejected = not_ready = None
            while rejected is None or rejected.status_code == 200:
                rejected = server.client.post(
                    "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}
                )
            # The socket stays open until load balancers have noticed.
            not_ready = server.client.get("/health/ready")
            assert server.client.get("/health/live").status_code == 200
            remaining = list(lines)
        log = server.ended()
    assert rejected.status_code == 503
    assert rejected.json()["error"]["code"] == "shutting_down"
    assert int(rejected.headers["retry-after"]) >= 1
    assert not_ready.status_code == 503
    assert not_ready.json()["reason"] == "the server is shutting down"
    assert remaining[-1] == "data: [DONE]"
    assert (
        json.loads(remaining[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    )
    assert not any("ending what still runs" in line for line in log)


def test_a_stream_that_exceeds_the_drain_timeout_ends_with_an_error_event(tmp_path: Path) -> None:
    with served(tmp_path, drain_timeout=0.3, step_s=SLOW_STEP_S) as server:
        with server.stream(300) as lines:
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        log = server.ended()
    assert 0.3 <= time.monotonic() - started < SOON_S
    assert error_in(last)["code"] == "shutting_down"
    assert error_in(last)["type"] == "server_error"
    assert done == "data: [DONE]"
    assert any("ending what still runs" in line and "timeout" in line for line in log)


def test_a_response_that_exceeds_the_drain_timeout_is_a_503(tmp_path: Path) -> None:
    with served(tmp_path, drain_timeout=0.3, step_s=SLOW_STEP_S) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 300}
        pending = PendingRequest(server.client, body)
        while '"a step begins"' not in server.log.read_text():
            pass
        server.process.send_signal(signal.SIGTERM)
        pending.join(60)
        server.ended()
    assert pending.response.status_code == 503
    assert pending.response.json()["error"]["code"] == "shutting_down"
    assert int(pending.response.headers["retry-after"]) >= 1


def test_every_one_of_many_requests_gets_a_503_or_a_last_event(tmp_path: Path) -> None:
    """Running streams get their last event; streams without a first token, and complete responses,
    get a status."""
    with served(tmp_path, drain_timeout=0.5, step_s=SLOW_STEP_S) as server:
        body = {"model": "tiny", "prompt": "x" * 20, "max_tokens": 200}
        requests = [
            PendingRequest(server.client, {**body, "stream": bool(i % 2)}) for i in range(24)
        ]
        while True:
            page = server.client.get("/metrics").text
            (line,) = re.findall(r"num_requests_waiting{tenant_class=\"standard\"} (\S+)", page)
            if float(line) > 0 and server.log.read_text().count("a step begins") > 8:
                break
        server.process.send_signal(signal.SIGTERM)
        for request in requests:
            request.join(60)
        server.ended()
    endings = Counter(ending_of(request.response) for request in requests)
    assert endings.total() == len(requests)
    assert set(endings) == {"503", "last event"}
    assert endings["503"] >= len(requests) / 2


def ending_of(response: httpx2.Response) -> str:
    if response.status_code == 503:
        assert response.json()["error"]["code"] == "shutting_down"
        return "503"
    *_, last, done = (line for line in response.text.splitlines() if line)
    assert done == "data: [DONE]"
    assert error_in(last)["code"] == "shutting_down"
    return "last event"


def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    with served(tmp_path, drain_timeout=60, step_s=SLOW_STEP_S) as server:
        with server.stream(300) as lines:
            server.process.send_signal(signal.SIGTERM)
            while server.client.get("/health/ready").status_code == 200:
                pass
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        log = server.ended()
    assert time.monotonic() - started < SOON_S
    assert error_in(last)["code"] == "shutting_down"
    assert done == "data: [DONE]"
    assert any("a second signal" in line for line in log)


def test_a_stalled_upload_gets_a_503(tmp_path: Path) -> None:
    """The timeout of its body is longer than those of the drain and of the connections."""
    with served(tmp_path, drain_timeout=0.1, closing_s=1) as server:
        key = server.client.headers["authorization"]
        head = (
            "PUT /v1/prefixes/x HTTP/1.1", "host: x", f"authorization: {key}",
            "content-type: application/json", "content-length: 100", "", '{"kind": "text"',
        )  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.client.base_url.port)) as sender:
            sender.sendall("\r\n".join(head).encode())
            server.client.get("/health/live")  # the upload came first, so it runs
            server.process.send_signal(signal.SIGTERM)
            response = sender.makefile("rb").read()
        log = server.ended()
    assert response.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"shutting_down"' in response
    (request,) = [entry for line in log if (entry := json.loads(line)).get("method") == "PUT"]
    assert request["status"] == 503
    assert not any("Traceback" in line or "exception" in line for line in log)


def test_a_hanging_device_does_not_prevent_the_exit(tmp_path: Path) -> None:
    """Requests still get a response; the exit status is 1."""
    with served(tmp_path, drain_timeout=0.2, step_s=3600, closing_s=1) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3}
        pending = PendingRequest(server.client, body)
        while '"a step begins"' not in server.log.read_text():
            pass
        server.process.send_signal(signal.SIGTERM)
        pending.join(60)
        assert server.process.wait(60) == 1
        log = server.log.read_text()
    assert pending.response.status_code == 503
    assert "something hangs" in log
