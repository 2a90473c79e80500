"""SIGTERM on a real process: what runs finishes or is told, and the status is 0."""

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

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("draining_child.py")
ENDS = (signal.SIGTERM, signal.SIGINT)
# A fake stream of 300 steps at this pace outlasts every test here.
SLOW_STEP_S = 0.1
SOON_S = 20
"""Less than what is cut short would have taken: 30 seconds of patience, or of a stream."""


class Served:
    """A server in a child process, and a client of it."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.log = log
        self._said = process.stdout
        hello = json.loads(self._said.readline())
        url = f"http://127.0.0.1:{hello['port']}"
        headers = {"authorization": f"Bearer {hello['key']}"}
        self.client = httpx2.Client(base_url=url, headers=headers, timeout=20)
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
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            yield lines

    def ended(self) -> list[str]:
        """Wait for the end, which must be a good one; the log's lines."""
        assert self.process.wait(60) == 0, self.log.read_text()
        last = json.loads(self._said.readline())
        assert last["threads"] == []
        return self.log.read_text().splitlines()


@contextmanager
def served(folder: Path, *, patience: float, step_s: float = 0.0) -> Iterator[Served]:
    log = folder / "log"
    command = [sys.executable, str(CHILD), str(folder), str(patience), str(step_s)]
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
            one = Served(process, log)
            with closing(one.client):
                yield one
        finally:
            process.kill()


class Asking(threading.Thread):
    """A completion that is asked for now, and its answer when it is there."""

    answer: httpx2.Response

    def __init__(self, client: httpx2.Client, body: dict[str, Any]) -> None:
        super().__init__()
        self._client = client
        self._body = body
        self.start()

    def run(self) -> None:
        self.answer = self._client.post("/v1/completions", json=self._body)


def error_in(line: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(line.removeprefix("data: "))["error"]
    return error


@pytest.mark.parametrize("sig", ENDS)
def test_an_idle_server_ends_at_once(tmp_path: Path, sig: signal.Signals) -> None:
    with served(tmp_path, patience=30) as server:
        began = time.monotonic()
        server.process.send_signal(sig)
        log = server.ended()
    assert time.monotonic() - began < SOON_S
    assert any('"draining"' in line for line in log)
    assert any('"stopped"' in line for line in log)


def test_a_stream_that_ends_in_time_is_whole(tmp_path: Path) -> None:
    with served(tmp_path, patience=30, step_s=SLOW_STEP_S) as server:
        with server.stream(12) as lines:
            server.process.send_signal(signal.SIGTERM)
            refused = not_ready = None
            while refused is None or refused.status_code == 200:
                refused = server.client.post(
                    "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}
                )
            # The socket listens on, for those whose load balancer has not noticed yet.
            not_ready = server.client.get("/health/ready")
            assert server.client.get("/health/live").status_code == 200
            rest = list(lines)
        log = server.ended()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert int(refused.headers["retry-after"]) >= 1
    assert not_ready.status_code == 503
    assert not_ready.json()["reason"] == "the server is shutting down"
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert not any("ending what still runs" in line for line in log)


def test_a_stream_that_does_not_end_is_told(tmp_path: Path) -> None:
    with served(tmp_path, patience=0.3, step_s=SLOW_STEP_S) as server:
        with server.stream(300) as lines:
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        log = server.ended()
    assert 0.3 <= time.monotonic() - began < SOON_S
    assert error_in(last)["code"] == "shutting_down"
    assert error_in(last)["type"] == "server_error"
    assert done == "data: [DONE]"
    assert any("ending what still runs" in line and "timeout" in line for line in log)


def test_an_answer_that_is_not_whole_in_time_is_a_503(tmp_path: Path) -> None:
    with served(tmp_path, patience=0.3, step_s=SLOW_STEP_S) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 300}
        asking = Asking(server.client, body)
        while '"a step begins"' not in server.log.read_text():
            pass
        server.process.send_signal(signal.SIGTERM)
        asking.join(20)
        server.ended()
    assert asking.answer.status_code == 503
    assert asking.answer.json()["error"]["code"] == "shutting_down"
    assert int(asking.answer.headers["retry-after"]) >= 1


def test_of_a_crowd_nobody_is_left_without_a_word(tmp_path: Path) -> None:
    """Streams that run get their last event; those that still wait for their first token, and
    whole answers, a status."""
    with served(tmp_path, patience=0.5, step_s=SLOW_STEP_S) as server:
        body = {"model": "tiny", "prompt": "x" * 20, "max_tokens": 200}
        crowd = [Asking(server.client, {**body, "stream": bool(i % 2)}) for i in range(24)]
        while True:
            page = server.client.get("/metrics").text
            (line,) = re.findall(r"num_requests_waiting{tenant_class=\"standard\"} (\S+)", page)
            if float(line) > 0 and server.log.read_text().count("a step begins") > 8:
                break
        server.process.send_signal(signal.SIGTERM)
        for one in crowd:
            one.join(20)
        server.ended()
    endings = Counter(ending_of(one.answer) for one in crowd)
    assert endings.total() == len(crowd)
    assert set(endings) == {"503", "last event"}
    assert endings["503"] >= len(crowd) / 2


def ending_of(answer: httpx2.Response) -> str:
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "shutting_down"
        return "503"
    *_, last, done = (line for line in answer.text.splitlines() if line)
    assert done == "data: [DONE]"
    assert error_in(last)["code"] == "shutting_down"
    return "last event"


def test_a_second_signal_ends_the_waiting(tmp_path: Path) -> None:
    with served(tmp_path, patience=60, step_s=SLOW_STEP_S) as server:
        with server.stream(300) as lines:
            server.process.send_signal(signal.SIGTERM)
            while server.client.get("/health/ready").status_code == 200:
                pass
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        log = server.ended()
    assert time.monotonic() - began < SOON_S
    assert error_in(last)["code"] == "shutting_down"
    assert done == "data: [DONE]"
    assert any("a second signal" in line for line in log)


def test_an_upload_that_stalls_is_told_too(tmp_path: Path) -> None:
    """Its body is waited for longer than the server waits."""
    with served(tmp_path, patience=0.1) as server:
        key = server.client.headers["authorization"]
        head = (
            "PUT /v1/prefixes/x HTTP/1.1", "host: x", f"authorization: {key}",
            "content-type: application/json", "content-length: 100", "", '{"kind": "text"',
        )  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.client.base_url.port)) as sender:
            sender.sendall("\r\n".join(head).encode())
            server.client.get("/health/live")  # the upload came first, so it runs
            server.process.send_signal(signal.SIGTERM)
            answer = sender.makefile("rb").read()
        log = server.ended()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"shutting_down"' in answer
    (request,) = [one for line in log if (one := json.loads(line)).get("method") == "PUT"]
    assert request["status"] == 503
    assert not any("Traceback" in line or "exception" in line for line in log)


def test_a_device_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    """The streams are told all the same; the status then says that something was wrong."""
    with served(tmp_path, patience=0.2, step_s=3600) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3}
        asking = Asking(server.client, body)
        while '"a step begins"' not in server.log.read_text():
            pass
        server.process.send_signal(signal.SIGTERM)
        asking.join(20)
        assert server.process.wait(20) == 1
        log = server.log.read_text()
    assert asking.answer.status_code == 503
    assert "something hangs" in log
