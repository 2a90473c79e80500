"""Failures of the disk and the database, sorted in one place into the two that a caller can meet.

::

    FULL      no room: ENOSPC, EDQUOT, SQLITE_FULL, PostgreSQL's 53100
    FAILED    cannot be used now: EIO, EROFS, a folder without permission or gone, SQLITE_IOERR,
              SQLITE_READONLY, PostgreSQL's 58030 and 25006
"""

import errno
import sqlite3
from enum import StrEnum


class StorageFault(StrEnum):
    """What is wrong with the storage. FULL: removing something helps."""

    FULL = "full"
    FAILED = "failed"


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FAILED = frozenset(
    {
        errno.EIO,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,  # a folder of ours that is gone, such as with its mount
        errno.ENOTDIR,
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,
        errno.EFBIG,
        errno.ELOOP,
        errno.EBADMSG,  # a checksum or a structure of the file system is wrong
        errno.EUCLEAN,
        errno.ESHUTDOWN,  # the file system was stopped after an error
        errno.ENOTCONN,  # the process behind a FUSE mount has ended
        errno.EREMOTEIO,
    }
)
_SQLITE = {
    sqlite3.SQLITE_FULL: StorageFault.FULL,
    sqlite3.SQLITE_IOERR: StorageFault.FAILED,
    sqlite3.SQLITE_READONLY: StorageFault.FAILED,
    sqlite3.SQLITE_CANTOPEN: StorageFault.FAILED,
}
_HIDES_ERRNO = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_SQLSTATES = {
    "53100": StorageFault.FULL,  # disk_full
    "58030": StorageFault.FAILED,  # io_error
    "25006": StorageFault.FAILED,  # read_only_sql_transaction
    "42501": StorageFault.FAILED,  # insufficient_privilege: PostgreSQL's word for EROFS, EACCES
}


def storage_fault(error: BaseException) -> StorageFault | None:
    """The fault behind an OSError or an error of the database; None for any other error.

    Takes an error of the driver, or SQLAlchemy's, which has the driver's as ``orig``.
    """
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, OSError):
        if cause.errno in _FULL:
            return StorageFault.FULL
        return StorageFault.FAILED if cause.errno in _FAILED else None
    if isinstance(cause, sqlite3.Error):
        return _SQLITE.get(_primary_code(cause))
    return _SQLSTATES.get(str(getattr(cause, "sqlstate", None)))


def hides_errno(error: BaseException) -> bool:
    """Whether SQLite has one code for several causes here, with a full disk among them: EDQUOT, or
    ENOSPC while it opens or extends its shared memory, is an I/O error to it."""
    cause = getattr(error, "orig", None) or error
    return isinstance(cause, sqlite3.Error) and _primary_code(cause) in _HIDES_ERRNO


def _primary_code(error: sqlite3.Error) -> int:
    code: int = getattr(error, "sqlite_errorcode", 0)  # absent where Python itself raised
    return code & 0xFF
