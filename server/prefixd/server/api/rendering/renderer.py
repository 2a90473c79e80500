"""Chat templates of tenants, rendered in another process: see ``worker``."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixd.server.api.metrics import RenderOutcome
from prefixd.server.errors import TooManyTemplates, Unavailable

WALL_S = 10.0
"""The longest wait for one render, in seconds. Its CPU time has a limit of its own, far below."""

MAX_RENDERS = 8
"""At a time, of all tenants; more of them wait."""

RENDERS_OF_TENANT = 2
"""At a time, of one tenant; as many more of them wait, each in a thread of its caller."""

_WORKER = Path(__file__).with_name("worker.py")
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
"""No other variable of the server, such as a password of its database, is in that process."""

_WAIT_S = 3.0  # of a caller that waits for the catalog's threads, which is refused after 4 s
_END_S = 2.0
_CHUNK = 1 << 16


class TemplateFailed(Exception):
    """A template gave no text. ``cause`` is a word for logs."""

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class RenderPlaces:
    """Who renders: MAX_RENDERS in all, RENDERS_OF_TENANT of one tenant. Used by any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rendering: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def hold(self, tenant: str) -> Iterator[None]:
        """Hold a place inside the block. Raises TooManyTemplates, Unavailable."""
        with self._changed:
            if not self._is_free(tenant):
                self._wait(tenant)
            self._rendering[tenant] += 1
        try:
            yield
        finally:
            with self._changed:
                _decrease(self._rendering, tenant)
                self._changed.notify_all()

    def _is_free(self, tenant: str) -> bool:
        of_all = self._rendering.total()
        return of_all < MAX_RENDERS and self._rendering[tenant] < RENDERS_OF_TENANT

    def _wait(self, tenant: str) -> None:
        if self._waiting[tenant] >= RENDERS_OF_TENANT:
            raise TooManyTemplates(
                f"expected at most {2 * RENDERS_OF_TENANT} requests of the tenant at a time whose "
                "prompt_template is being rendered, or waits for it; received one more",
                retry_after=1,
            )
        self._waiting[tenant] += 1
        try:
            if not self._changed.wait_for(lambda: self._is_free(tenant), _WAIT_S):
                raise Unavailable("too many chat templates are being rendered", retry_after=1)
        finally:
            _decrease(self._waiting, tenant)


def _decrease(counts: Counter[str], tenant: str) -> None:
    counts[tenant] -= 1
    if not counts[tenant]:
        del counts[tenant]


@dataclass(slots=True)
class TemplateRenderer:
    """Renders templates. The process is started with the first of them, and again if it ends.
    ``num_started`` counts them. Methods may be called from any thread."""

    wall_s: float = WALL_S
    count: Callable[[RenderOutcome], None] = lambda _outcome: None
    num_started: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _places: RenderPlaces = field(default_factory=RenderPlaces)
    _process: "subprocess.Popen[bytes] | None" = None
    _control: socket.socket | None = None
    _closed: bool = False

    def render(
        self, template: str, variables: Mapping[str, Any], *, tenant: str, max_characters: int
    ) -> str:
        """The text of a template of ``tenant``. Blocking. Raises TemplateFailed, TooManyTemplates,
        Unavailable."""
        request = {
            "template": template,
            "variables": variables,
            "max_characters": max_characters,
        }
        outcome = RenderOutcome.FAILED
        try:
            text = self._text(json.dumps(request).encode(), tenant)
            outcome = RenderOutcome.RENDERED
        except (TooManyTemplates, Unavailable):
            outcome = RenderOutcome.REFUSED
            raise
        finally:
            self.count(outcome)
        return text

    def _text(self, request: bytes, tenant: str) -> str:
        with self._places.hold(tenant):
            reply = self._reply(request)
        if not reply:
            raise TemplateFailed(
                "it took more than 1 s of processor time, or 256 MiB of memory", cause="limits"
            )
        result: dict[str, str] = json.loads(reply)
        if "error" in result:
            raise TemplateFailed(result["error"], cause=result["cause"])
        return result["text"]

    def close(self) -> None:
        """End the process; nothing is rendered any more."""
        with self._lock:
            self._closed = True
            self._end()

    def _reply(self, request: bytes) -> bytes:
        """The reply; empty when the child died of its limits. Raises Unavailable."""
        for _ in range(2):  # the worker may have died since the last render
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    process = self._pass_on(theirs)
                received = _exchange(ours, request, wall_s=self.wall_s)
            if received:
                return received[1:]
            with self._lock:
                if self._process is process:
                    self._end()
        raise Unavailable("chat templates cannot be rendered", retry_after=1)

    def _pass_on(self, channel: socket.socket) -> "subprocess.Popen[bytes]":
        """Give the worker one end of a socket, which is lost with one that has died; the worker."""
        with self._lock:
            if self._closed:
                raise Unavailable("the server is stopping", retry_after=1)
            if self._control is None or self._process is None:
                self._control, self._process = self._start()
            with suppress(OSError):
                socket.send_fds(self._control, [b"r"], [channel.fileno()])
            return self._process

    def _start(self) -> "tuple[socket.socket, subprocess.Popen[bytes]]":
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - a module of this program
                [sys.executable, "-P", str(_WORKER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            )
        self.num_started += 1
        return ours, process

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()  # the worker ends with it
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _exchange(channel: socket.socket, request: bytes, *, wall_s: float) -> bytes:
    """What a child answers: nothing if it never began, one byte without a reply."""
    until, received = time.monotonic() + wall_s, bytearray()
    # The child may die before it has read the request, or written all of the reply.
    with suppress(TimeoutError, ConnectionError):
        channel.settimeout(wall_s)
        received += channel.recv(1)
        if received:
            channel.sendall(request)
            channel.shutdown(socket.SHUT_WR)
        while received:
            channel.settimeout(max(0.001, until - time.monotonic()))
            chunk = channel.recv(_CHUNK)
            if not chunk:
                return bytes(received)
            received += chunk
    return bytes(received[:1])
