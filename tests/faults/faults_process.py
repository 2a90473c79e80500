"""A server process that a test stops or kills."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefixd.server.cli.demo.child import PROGRAM, ServerProcess


class KillableServer(ServerProcess):
    """A ``prefixd serve`` with additional flags and variables, to which tests send signals."""

    def __init__(
        self,
        *,
        data_dir: Path,
        model: Path,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        program = ("/usr/bin/env", *variables, *PROGRAM)  # replaced by the server: one process
        super().__init__(data_dir=data_dir, port=0, model=str(model), program=program)
        self._command += flags

    def ready(self) -> str:
        """Wait until the server is ready and return its URL."""
        return self.wait_until_ready(timeout=120, on_event=lambda _: None)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, number: int) -> None:
        """Send a signal to the process, if it still runs."""
        self._process.send_signal(number)

    def ended(self, *, limit: float) -> int | None:
        """Its exit status; None when it still runs after ``limit`` seconds."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return None

    @property
    def family(self) -> list[int]:
        """Process ids of its session that still exist; it was started in a session of its own."""
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    # pid (comm) state ppid pgrp session …; comm may hold spaces
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[0] != "Z" and int(fields[3]) == self._process.pid:
                    pids.append(int(entry.name))
        return [pid for pid in pids if pid != os.getpid()]
