"""Files that survive a power failure: what must be fsynced in addition to the data itself."""

import hashlib
import os
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path

_COPY_BYTES = 1024 * 1024


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: a file's own fsync does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Make ``path`` and its parents (mode 0700), each made durable in its parent directory."""
    missing = [directory for directory in (path, *path.parents) if not directory.is_dir()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
        # Also when another process created it: that process may not have called fsync yet.
        fsync_directory(directory.parent)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and fsync them; the caller makes the new name durable."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, _COPY_BYTES)
        written.flush()
        os.fsync(written.fileno())


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_older(directory: Path, *, before: datetime) -> None:
    """Remove the files under ``directory`` that were last written or touched before ``before``."""
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < before.timestamp():
                path.unlink()
