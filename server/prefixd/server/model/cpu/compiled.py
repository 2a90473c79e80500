"""Compile the native library into a folder of its own, once for all processes that use the folder.

A file in it is code that the server runs, so the folder and the files must be the user's own, and
writable for this user alone.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixd.server.model.cpu.build import (
    BuildFailed,
    Compiler,
    build_library,
    description_of,
    source_digest,
    write_description,
)

log = logging.getLogger(__name__)

_DIGITS = 16
_POLL_S = 0.1
_NAME = "prefixd_cpu"
_BUILD_PREFIX = "build-"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class FolderRefused(Exception):
    """Another user can write a library or its folder, or the folder may hold no code; the message
    says which."""


def find_compiled(
    folder: Path, *, machine: str, sources: Path, compiler: Compiler | None
) -> Path | None:
    """The library that was compiled from these sources by this compiler; by any, the newest, where
    there is no compiler. Raises FolderRefused."""
    if not folder.is_dir():
        return None
    check_owner(folder)
    if compiler is None:
        files = folder.glob(f"{_NAME}-{machine}-{source_digest(sources)[:_DIGITS]}-*.so")
        path = max(files, key=lambda path: path.stat().st_mtime, default=None)
    else:
        path = folder / _file_name(machine, sources, compiler)
    if path is None or not path.is_file():
        return None
    check_owner(path)
    return path


def compile_into(
    folder: Path,
    *,
    compiler: Compiler,
    sources: Path,
    is_usable: Callable[[Path], bool],
    timeout_s: float,
) -> Path:
    """Compile the library, unless another process did meanwhile and ``is_usable``.

    Libraries of other sources are removed. Raises BuildFailed, FolderRefused or OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(folder)
    _check_executable(folder)
    path = folder / _file_name(compiler.machine, sources, compiler)
    deadline = time.monotonic() + timeout_s
    with _locked(folder / "lock", deadline):
        if path.is_file() and is_usable(path):
            return path
        for leftover in folder.glob(f"{_BUILD_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        _compile(path, compiler, sources, max(deadline - time.monotonic(), 0))
        for old in folder.glob(f"{_NAME}-{compiler.machine}-*"):
            if old not in {path, description_of(path)}:
                old.unlink()
    return path


def check_owner(path: Path) -> None:
    """Raise FolderRefused unless only this user can write ``path``, which is no link."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise FolderRefused(f"{path}: expected a folder or file, got a link")
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        expected = f"expected it to be writable for user {os.geteuid()} alone"
        mode = stat.S_IMODE(status.st_mode)
        raise FolderRefused(f"{path}: {expected}, it is of user {status.st_uid}, mode {mode:04o}")


def _check_executable(folder: Path) -> None:
    """Raise FolderRefused where no library can be loaded: each start would compile in vain."""
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise FolderRefused(f"{folder}: expected a file system with code, it is mounted noexec")


def _compile(path: Path, compiler: Compiler, sources: Path, timeout_s: float) -> None:
    log.info("compiling the native CPU library with %s", compiler.version)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_BUILD_PREFIX) as name:
        output = Path(name, path.name)
        built = build_library(output, compiler=compiler, sources=sources, timeout_s=timeout_s)
        write_description(output, built)
        output.chmod(0o600)
        # The library last: where it is, its description is.
        description_of(output).replace(description_of(path))
        output.replace(path)
    log.info("compiled the native CPU library in %s s: %s", built.seconds, path)


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold the lock file; the kernel ends the lock with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildFailed(f"another process compiles for too long: {path}") from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _file_name(machine: str, sources: Path, compiler: Compiler) -> str:
    by = hashlib.sha256(f"{compiler.command}\0{compiler.version}\0{compiler.target}".encode())
    parts = [_NAME, machine, source_digest(sources)[:_DIGITS], by.hexdigest()[:_DIGITS]]
    return "-".join(parts) + ".so"
