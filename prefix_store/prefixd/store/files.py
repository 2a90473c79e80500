"""Files that survive a power failure, files in progress, and files that are not regular.

A file in progress is locked by the process that writes it; the kernel ends the lock with the
process. So an unlocked file in a folder for files in progress was left by an interrupted one.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

UPLOAD_PREFIX = "upload-"
"""Names of the files in the folder for uploads in flight begin with this."""

_COPY_BYTES = 1024 * 1024


class IrregularFile(OSError):
    """A link, folder, pipe, socket or device in the place of a regular file."""


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
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            message = f"expected a folder, got a {_kind(directory.lstat())}"
            raise NotADirectoryError(errno.ENOTDIR, message, str(directory)) from error
        # Also when another process created it: that process may not have called fsync yet.
        fsync_directory(directory.parent)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and fsync them; the caller makes the new name durable. Raises
    IrregularFile."""
    with open_regular(source) as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, _COPY_BYTES)
        written.flush()
        os.fsync(written.fileno())


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises IrregularFile for anything else, without opening it:
    opening a pipe would block, and a link or a device may lead anywhere."""
    _check_regular(path, path.lstat())
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # replaced since: a link, a socket
            raise IrregularFile(f"expected a regular file at {path}") from error
        raise
    try:
        _check_regular(path, os.fstat(descriptor))
    except IrregularFile:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFile(f"expected a regular file at {path}, got a {_kind(status)}")


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "special file")


_KINDS = {
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFREG: "file",
    stat.S_IFSOCK: "socket",
}


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal. Raises IrregularFile."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``, in place of anything there. A folder is kept next to it."""
    try:
        source.replace(target)
    except IsADirectoryError:
        set_aside(target)
        source.replace(target)


def set_aside(folder: Path) -> None:
    """Rename a folder that is in the place of a file: what is in it is not ours to remove."""
    folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}"))


def remove_irregular(path: Path) -> None:
    """Remove what is in the place of a regular file, and keep a folder under another name."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            set_aside(path)
        elif not stat.S_ISREG(status.st_mode):
            path.unlink()


@contextmanager
def file_in_progress(directory: Path, *, prefix: str = "") -> Iterator[tuple[Path, BinaryIO]]:
    """A new file, locked and open for reading and writing; removed at the end of the block."""
    while True:
        path = directory / f"{prefix}{secrets.token_hex(16)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "w+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                # ``remove_interrupted`` of another process may have removed it before the lock.
                if os.fstat(file.fileno()).st_nlink:
                    yield path, file
                    return
            finally:
                path.unlink(missing_ok=True)


def interrupted(directory: Path, *, prefix: str = "") -> Iterator[Path]:
    """The files in progress whose process has ended. One that was created in this moment may be
    among them, before its process has locked it."""
    paths: list[Path] = []
    with suppress(FileNotFoundError):
        paths = [path for path in directory.iterdir() if path.name.startswith(prefix)]
    for path in paths:
        with suppress(FileNotFoundError, IrregularFile), open_regular(path) as file:
            if _lock(file):
                yield path


def remove_interrupted(directory: Path, *, prefix: str = "") -> int:
    """Remove the files in progress whose process has ended; how many."""
    count = 0
    for path in interrupted(directory, prefix=prefix):  # locked until the next one
        path.unlink(missing_ok=True)
        count += 1
    return count


def _lock(file: BinaryIO) -> bool:
    """Lock ``file`` until it is closed; False when another process holds its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_older(directory: Path, *, before: datetime, skipped: Path) -> None:
    """Remove the files under ``directory``, but not those in ``skipped``, that were last written or
    touched before ``before``."""
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            old = path.lstat().st_mtime < before.timestamp()
            if old and path.parent != skipped and path.is_file():
                path.unlink()
