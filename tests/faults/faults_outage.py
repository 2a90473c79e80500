"""A fault that lasts while clients call: the bounds that hold during it, and how they are measured.

The bounds are those of docs/operations.md. A test asserts them with ``within``, which multiplies
them by the one slack factor, for machines that run other work at the same time.
"""

import asyncio
import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from prefixd.server.cli.demo.child import PROGRAM, child_environment

LIVE_WITHIN_S = 1.0
"""/health/live responds within this time, throughout."""

REFUSED_WITHIN_S = 5.0
"""A request that needs the failed component is refused within this time."""

NOT_READY_WITHIN_S = 8.0
"""/health/ready is 503: a failing probe is noticed, and has then failed for 5 s."""

READY_WITHIN_S = 5.0
"""/health/ready is 200 again after the fault has ended."""

RECOVERED_WITHIN_S = 10.0
"""After the fault has ended everything works again, without a restart."""

SLACK = float(os.environ.get("PREFIXD_TEST_SLACK", "3"))
"""The factor by which a shared machine may exceed the bounds."""

_POLL_S = 0.1


def within(bound_s: float) -> float:
    """``bound_s`` with the slack of this machine, in seconds."""
    return bound_s * SLACK


@dataclass(frozen=True, slots=True)
class Called:
    """The response to one request: ``code`` is None without an error, ``status`` 0 without a
    response."""

    status: int
    code: str | None
    seconds: float
    retry_after: str | None = None
    body: Any = None


@dataclass(slots=True)
class HealthProber:
    """Polls /health/live and /health/ready of a server in two threads while entered.

    ``live`` has the seconds of each response; ``failures`` what was no 200; ``ready`` the status
    and the reason at each change, in order.
    """

    url: str
    live: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ready: list[tuple[int, str | None]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        for probe in (self._probe_live, self._probe_ready):
            thread = threading.Thread(target=self._run, args=(probe,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if error is not None:
            error.add_note(f"live failed: {self.failures}; ready: {self.ready}")

    def check_live(self) -> None:
        """Every probe of /health/live responded with 200 within the bound."""
        assert self.live or self.failures, "no probe has ended"
        assert not self.failures, f"{len(self.failures)} failed: {self.failures[:5]}"
        assert max(self.live) <= within(LIVE_WITHIN_S), f"the slowest took {max(self.live):.2f} s"

    def wait_for_ready(self, status: int, *, timeout_s: float) -> str | None:
        """Wait until /health/ready last had ``status``; its reason."""
        wait_until(lambda: self.ready[-1:] and self.ready[-1][0] == status, timeout_s=timeout_s)
        return self.ready[-1][1]

    def _run(self, probe: Callable[[], None]) -> None:
        while not self._stop.is_set():
            probe()
            self._stop.wait(_POLL_S)

    def _probe_live(self) -> None:
        start = time.monotonic()
        try:
            status, _ = _get(self.url, "/health/live")
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(f"{error!r} after {time.monotonic() - start:.2f} s")
            return
        self.live.append(time.monotonic() - start)
        if status != 200:
            self.failures.append(f"status {status}")

    def _probe_ready(self) -> None:
        try:
            status, body = _get(self.url, "/health/ready")
        except (OSError, http.client.HTTPException) as error:
            status, body = 0, {"reason": repr(error)}
        shown = (status, body.get("reason"))
        if not self.ready or self.ready[-1][0] != status:
            self.ready.append(shown)


def call_all(
    url: str, requests: Sequence[httpx2.Request], *, timeout_s: float = within(REFUSED_WITHIN_S)
) -> list[Called]:
    """Send all ``requests`` at once and wait for every response; one that takes longer than
    ``timeout_s`` has status 0 and code ``timeout``. ``url`` is the server's."""
    return asyncio.run(_call_all(url, requests, timeout_s))


def request(
    url: str, method: str, path: str, headers: Mapping[str, str], **content: Any
) -> httpx2.Request:
    """A request for ``call_all``; ``content``: ``json``, ``content`` or ``files``, as httpx has."""
    return httpx2.Request(method, f"{url}{path}", headers=dict(headers), **content)


async def _call_all(url: str, requests: Sequence[httpx2.Request], timeout_s: float) -> list[Called]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=url, timeout=timeout_s, limits=limits) as http:
        return await asyncio.gather(*(_call(http, one, timeout_s) for one in requests))


async def _call(http: httpx2.AsyncClient, one: httpx2.Request, timeout_s: float) -> Called:
    start = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            response = await http.send(one)
    except TimeoutError:
        return Called(0, "timeout", time.monotonic() - start)
    except httpx2.TransportError as error:
        return Called(0, type(error).__name__, time.monotonic() - start)
    seconds = time.monotonic() - start
    try:
        body = response.json()
    except ValueError:
        body = response.text
    code = body["error"]["code"] if isinstance(body, dict) and body.get("error") else None
    return Called(response.status_code, code, seconds, response.headers.get("retry-after"), body)


def check_refused(calls: Sequence[Called], *, status: int, code: str) -> None:
    """Every call was refused so, within the bound, and told when to try again."""
    assert calls
    for call in calls:
        assert (call.status, call.code) == (status, code), call
        assert call.seconds <= within(REFUSED_WITHIN_S), call
        if status == 503:
            assert call.retry_after is not None, call


def wait_until(condition: Callable[[], Any], *, timeout_s: float) -> None:
    """Wait until ``condition`` is true; fail after ``timeout_s``."""
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        pause.wait(_POLL_S)


def check_recovers(check: Callable[[], None]) -> float:
    """Repeat ``check`` until it passes, at most for the bound; the seconds that it took. Its last
    failure is raised."""
    pause, start = threading.Event(), time.monotonic()
    while True:
        try:
            check()
        except (AssertionError, OSError, httpx2.TransportError):
            if time.monotonic() - start > within(RECOVERED_WITHIN_S):
                raise
            pause.wait(_POLL_S)
        else:
            return time.monotonic() - start


def check_integrity(data_dir: Path, *flags: str) -> None:
    """``prefixd doctor --integrity`` finds nothing. ``flags`` name a database or a bucket."""
    checked = _doctor("--integrity", "--data-dir", str(data_dir), *flags)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _doctor(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = child_environment(os.environ)
    command = [*PROGRAM, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _get(url: str, path: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON body, on a connection of its own."""
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=within(LIVE_WITHIN_S))
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
