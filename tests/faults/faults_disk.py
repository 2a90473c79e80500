"""A small disk that a test fills, and a server whose data folder is on it."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.faults.faults_process import KillableServer

MIB = 1024 * 1024


class SmallDisk:
    """A mounted tmpfs. ``fill`` leaves no byte free; ``free`` removes what it wrote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filler = root / "filler"

    @property
    def free_bytes(self) -> int:
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        """Write until the disk is full, or has ``leave`` bytes free."""
        with self._filler.open("ab", buffering=0) as file, suppress_full():
            while self.free_bytes > leave:
                file.write(bytes(min(MIB, self.free_bytes - leave)))

    def free(self) -> None:
        """Make room again."""
        self._filler.unlink()


@contextmanager
def suppress_full() -> Iterator[None]:
    """Suppress ENOSPC."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


@contextmanager
def small_disk(root: Path, *, size: int, options: str = "") -> Iterator[SmallDisk]:
    """A tmpfs of ``size`` bytes at ``root``; the test is skipped where none may be mounted."""
    root.mkdir(exist_ok=True)
    mounted = mount("-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(root))
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a tmpfs, which takes root: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(root)
    finally:
        # Lazily: a child that a failed test has not ended yet may have a file open.
        subprocess.run(["umount", "-l", str(root)], check=True)


def remount(root: Path, option: str) -> None:
    """Remount the disk at ``root`` with ``option``: ro or rw."""
    changed = mount("-o", f"remount,{option}", str(root))
    assert changed.returncode == 0, changed.stderr


def mount(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the program mount; the test is skipped where there is none."""
    try:
        return subprocess.run(
            ["mount", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        pytest.skip(f"needs the program mount: {error}")


def server_on(data: Path, model: Path, *, log: Path, flags: tuple[str, ...] = ()) -> KillableServer:
    """A server whose log is elsewhere than in its data folder, which may be full."""
    server = KillableServer(data_dir=data, model=model, flags=flags)
    server.log = log
    return server


def metric(http: httpx2.Client, name: str) -> float:
    """The value of a series, as /metrics shows it."""
    page = http.get("/metrics").text
    return float(next(line.split()[1] for line in page.splitlines() if line.split()[0] == name))
