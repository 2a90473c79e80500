"""Files that survive a power failure: what must be fsynced beside the data itself."""

import os
import shutil
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
    """Make ``path`` and its parents (mode 0700), each made durable in the directory above it."""
    missing = [directory for directory in (path, *path.parents) if not directory.is_dir()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
        # Also when another process was quicker: it may not have come to its fsync yet.
        fsync_directory(directory.parent)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and fsync them; the new name is the caller's to make durable."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, _COPY_BYTES)
        written.flush()
        os.fsync(written.fileno())
