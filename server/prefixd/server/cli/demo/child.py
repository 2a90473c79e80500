"""The demo's server: a child process and its log."""

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

# Settings of an operator's own server must not apply to the demo's; these affect speed only.
_INHERITED = frozenset({"PREFIXD_DEVICE", "PREFIXD_DTYPE", "PREFIXD_THREADS"})
_STOP_S = 15.0
PROGRAM = (sys.executable, "-P", "-m", "prefixd.server")
_SHOWN_LINES = 15


class DemoFailed(ClientError):
    """The demo failed; the message names the reason."""


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without settings of another server, and with downloads of models off."""
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith("PREFIXD_") or name in _INHERITED
    }
    return {**inherited, "HF_HUB_OFFLINE": "1"}


def admin(data_dir: Path, *arguments: str) -> object:
    """Run a verb on the demo's catalog; return the JSON it prints."""
    command = [*PROGRAM, *arguments, "--data-dir", str(data_dir), "--json"]
    process = subprocess.run(  # noqa: S603 - our own interpreter and our own arguments
        command, capture_output=True, text=True, check=False, env=child_environment(os.environ)
    )
    if process.returncode != 0:
        raise DemoFailed(f"`prefixd {' '.join(arguments)}` failed:\n{process.stderr.strip()}")
    value: object = json.loads(process.stdout)
    return value


class ServerProcess:
    """``prefixd serve`` with ``options`` as a child process, which ends with the ``with`` block."""

    def __init__(
        self,
        *,
        data_dir: Path,
        port: int,
        model: str = "demo",
        options: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.log = data_dir / "server.log"
        self.url = ""
        self._tail = deque[str](maxlen=_SHOWN_LINES)
        self._events = queue.SimpleQueue[Mapping[str, object]]()
        # fmt: off
        self._command = [
            *program, "serve", "--model", model, "--host", "127.0.0.1",
            "--port", str(port), "--data-dir", str(data_dir),
            "--log-level", "info", "--log-format", "json", *options,
        ]
        # fmt: on

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches only this process, which then ends the server.
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
                self._tail.append(line.rstrip())
                self._events.put(_event(line))

    def wait_until_ready(self, *, timeout: float, on_event: Callable[[str], None]) -> str:
        """Wait until the server accepts requests; its URL. ``timeout`` is in seconds.

        ``on_event`` receives the event of each log line until then. Raises ``DemoFailed`` when the
        server ends or the timeout passes.
        """
        deadline = time.monotonic() + timeout
        while not self.url:
            try:
                event = self._events.get(timeout=0.2)
            except queue.Empty:
                self._check(deadline)
                continue
            on_event(str(event.get("event", "")))
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
            raise DemoFailed(
                "the server ended early. The end of its log:\n" + "\n".join(self._tail)
            )
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
    """A line of the server's JSON log; empty for other output on standard error."""
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
