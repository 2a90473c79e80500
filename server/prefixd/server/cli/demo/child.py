"""The demo's server: a child process, its log, and its end."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from prefixd.client.errors import ClientError
from prefixd.client.sync import Client

# What an operator set for a server of theirs must not steer the demo's; these only choose speed.
_KEPT = frozenset({"PREFIXD_DEVICE", "PREFIXD_DTYPE", "PREFIXD_THREADS"})
_STOP_S = 15.0
PROGRAM = (sys.executable, "-P", "-m", "prefixd.server")
_SHOWN_LINES = 15


class DemoFailed(ClientError):
    """The demo could not show what it promises; the message says why."""


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without settings of another server, and with model hubs out of reach."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith("PREFIXD_") or name in _KEPT
    }
    return {**kept, "HF_HUB_OFFLINE": "1"}


def admin(data_dir: Path, *arguments: str) -> object:
    """Run one of the server's own verbs on the demo's catalog; return the JSON it prints."""
    command = [*PROGRAM, *arguments, "--data-dir", str(data_dir), "--json"]
    done = subprocess.run(  # noqa: S603 - our own interpreter and our own arguments
        command, capture_output=True, text=True, check=False, env=child_environment(os.environ)
    )
    if done.returncode != 0:
        raise DemoFailed(f"`prefixd {' '.join(arguments)}` failed:\n{done.stderr.strip()}")
    answer: object = json.loads(done.stdout)
    return answer


class ServerProcess:
    """A ``prefixd serve`` of our own. Leaving the ``with`` ends it, whatever happened inside."""

    def __init__(
        self, *, data_dir: Path, port: int, model: str = "demo", program: Sequence[str] = PROGRAM
    ) -> None:
        self.log = data_dir / "server.log"
        self.url = ""
        self._last = deque[str](maxlen=_SHOWN_LINES)
        self._events = queue.SimpleQueue[Mapping[str, object]]()
        # fmt: off
        self._command = [
            *program, "serve", "--model", model, "--host", "127.0.0.1",
            "--port", str(port), "--data-dir", str(data_dir),
            "--log-level", "info", "--log-format", "json",
        ]
        # fmt: on

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches us alone, and we end the server in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own arguments
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=child_environment(os.environ),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        return self

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        with self.log.open("w", encoding="utf-8") as log, self._process.stderr as lines:
            for line in lines:
                log.write(line)
                log.flush()
                self._last.append(line.rstrip())
                self._events.put(_event(line))

    def wait_until_ready(self, *, timeout: float, say: Callable[[str], None]) -> str:
        """The URL, once the server takes requests; ``DemoFailed`` when it ends or is late.

        ``say`` gets what the server logs on the way.
        """
        deadline = time.monotonic() + timeout
        while not self.url:
            try:
                event = self._events.get(timeout=0.2)
            except queue.Empty:
                self._check(deadline)
                continue
            say(str(event.get("event", "")))
            if event.get("event") == "serving":
                self.url = str(event["url"])
        with Client(self.url, timeout=5.0) as client:
            while not _is_ready(client):
                self._check(deadline)
                time.sleep(0.1)
        return self.url

    def _check(self, deadline: float) -> None:
        if self._process.poll() is not None:
            self._reader.join()
            raise DemoFailed("the server ended early. Its last words:\n" + "\n".join(self._last))
        if time.monotonic() > deadline:
            raise DemoFailed(f"the server was not ready in time; its log is {self.log}")

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit code."""
        return self._process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()


def _event(line: str) -> Mapping[str, object]:
    """A line of the server's JSON log; empty for a library's own words on standard error."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _is_ready(client: Client) -> bool:
    try:
        return client.is_ready()
    except ClientError:
        return False
