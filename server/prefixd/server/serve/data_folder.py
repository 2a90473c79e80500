"""The data folder: checked before anything is loaded, with a message for each way it can fail."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prefixd.store.errors import DataFolderRefused
from prefixd.store.faults import StorageFault, storage_fault
from prefixd.store.files import make_directories

_FOLDERS = ("blobs", "blobs/.tmp", "uploads")
_WRITTEN = ("catalog.sqlite3", "catalog.sqlite3-wal", "catalog.sqlite3-shm", "blobs", "uploads")


def check_data_folder(root: Path) -> None:
    """Make the data folder where it is missing, in a folder that exists. A full disk is accepted.

    Raises DataFolderRefused with what was expected and what was found.
    """
    if not root.is_dir():
        _make(root)
    try:
        with tempfile.TemporaryFile(dir=root, prefix=".check-"):
            pass
    except OSError as error:
        if storage_fault(error) is not StorageFault.FULL:
            raise DataFolderRefused(_expected(root, _found(root, error))) from error
    _check_kinds(root)
    for path in _unwritable(root):
        raise DataFolderRefused(_expected(root, f"{_owned(path)}, and this is user {os.geteuid()}"))


def _make(root: Path) -> None:
    if root.exists():
        raise DataFolderRefused(_expected(root, "it is a file"))
    if root.is_symlink():
        raise DataFolderRefused(
            _expected(root, f"it is a link to {root.readlink()}, which is gone")
        )
    if not root.parent.is_dir():
        # Not made: where a disk is not mounted, an empty store would take the place of its own.
        found = f"there is no folder {root.parent} to make it in (is its disk mounted?)"
        raise DataFolderRefused(_expected(root, found))
    try:
        make_directories(root)
    except OSError as error:
        raise DataFolderRefused(_expected(root, _found(root.parent, error))) from error


def _check_kinds(root: Path) -> None:
    catalog = root / "catalog.sqlite3"
    if catalog.is_symlink() and not catalog.exists():
        found = f"{catalog} is a link to {catalog.readlink()}, which is gone"
        raise DataFolderRefused(_expected(root, found))
    if catalog.exists() and not catalog.is_file():
        raise DataFolderRefused(_expected(root, f"{catalog} is no regular file"))
    for path in (root / name for name in _FOLDERS):
        if os.path.lexists(path) and not path.is_dir():
            raise DataFolderRefused(_expected(root, f"{path} is no folder"))


def _unwritable(root: Path) -> Iterator[Path]:
    for name in _WRITTEN:
        path = root / name
        if path.exists() and not os.access(path, os.W_OK):
            yield path


def _expected(root: Path, found: str) -> str:
    return f"expected the data folder {root} to be writable; {found}"


def _found(folder: Path, error: OSError) -> str:
    match error.errno:
        case errno.EROFS:
            return f"the disk of {folder} is mounted read-only"
        case errno.EACCES | errno.EPERM:
            return f"{_owned(folder)}, and this is user {os.geteuid()}"
        case _:
            return f"{folder}: {error.strerror}"


def _owned(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return f"{path} is in a folder without permission"
    return f"{path} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
