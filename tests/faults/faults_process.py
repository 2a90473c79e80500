"""A server process that is ended in the middle of things, by its process id."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from prefixd.server.cli.demo.child import ServerProcess


class Victim(ServerProcess):
    """A ``prefixd serve`` with more flags, to be sent signals."""

    def __init__(self, *, data_dir: Path, model: Path, flags: Sequence[str] = ()) -> None:
        super().__init__(data_dir=data_dir, port=0, model=str(model))
        self._command += flags

    def ready(self) -> str:
        """Its URL, once it takes requests."""
        return self.wait_until_ready(timeout=120, say=lambda _: None)

    def send(self, number: int) -> None:
        """A signal to the process, if it still runs."""
        self._process.send_signal(number)

    def ended(self, *, limit: float) -> int | None:
        """Its exit status; None when it is still there after ``limit`` seconds."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return None

    @property
    def family(self) -> list[int]:
        """Process ids of its session that are still there: it was started in one of its own."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    # pid (comm) state ppid pgrp session …; comm may hold spaces
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[0] != "Z" and int(fields[3]) == self._process.pid:
                    found.append(int(entry.name))
        return [pid for pid in found if pid != os.getpid()]
