"""Room on the disk: a floor below which uploads are refused, and a reserve for getting below it.

::

    free bytes   twice the floor     the log warns
                 the floor           uploads and imports are refused; everything else works
                 reserve / 4         the reserve file is freed, so that deletes, the audit log and
                                     the collector can write; uploads never get its room
                 reserve and floor   there is room again: the reserve file is allocated again
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path

from prefixd.store.errors import StorageFull
from prefixd.store.faults import StorageFault, hides_errno, storage_fault
from prefixd.store.files import fsync_directory, remove_irregular

MIB = 1024 * 1024
RESERVE_FILE = "reserve"
RESERVE_BYTES = 16 * MIB
"""Size of the reserve; a quarter of the disk where that is less."""

MAX_FLOOR_BYTES = 256 * MIB
FLOOR_SHARE = 0.05
SAMPLE_EVERY_S = 2.0
REFUSALS = ("floor", *StorageFault)
"""Why a request was refused: the floor, or the fault that it met."""

_WARN_EVERY_S = 60.0
_PROBE_BYTES = 64 * 1024
_log = getLogger("prefixd.disk")


class DiskGuard:
    """Watches the folders that a server writes to, by name. Safe to share between threads.

    ``min_free`` is the floor in bytes, None for 256 MiB or 5 % of the disk, whichever is smaller.
    ``reserve`` is the folder of the reserve file: that of the SQLite catalog; None for none. Two
    processes with one folder share the file.
    """

    def __init__(
        self, folders: Mapping[str, Path], *, min_free: int | None = None, reserve: Path | None
    ) -> None:
        self._folders = dict(folders)
        self._min_free = min_free
        self._reserve = None if reserve is None else reserve / RESERVE_FILE
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._warned = -_WARN_EVERY_S
        self.refusals = Counter[str](dict.fromkeys(REFUSALS, 0))
        self.free: dict[str, int] = {}
        self.reserved = 0

    # -- refusing and failing ----

    def check(self, need: int = 0) -> None:
        """Raise StorageFull when an upload of ``need`` bytes would go below the floor. It is
        written twice: as it is received, and as it is stored."""
        for folder in self._folders.values():
            free, floor = self._room(folder)
            if free - 2 * need < floor + self._missing_reserve(folder):
                self._count("floor")
                raise StorageFull(
                    "the server's disk is nearly full, so that it takes no uploads: delete "
                    "prefixes that are not needed, or try again later"
                )

    def fault_of(self, error: BaseException) -> StorageFault | None:
        """The fault behind an error that ended a request or a task, as ``faults.storage_fault``;
        counted. FULL frees the reserve, so that the next write finds room."""
        fault = storage_fault(error)
        if fault is StorageFault.FAILED and hides_errno(error):
            fault = self._probe() or fault
        if fault is not None:
            self._count(fault.value)
        if fault is StorageFault.FULL:
            self.release()
        return fault

    def _count(self, reason: str) -> None:
        with self._counting:
            self.refusals[reason] += 1

    # -- the reserve ----

    def make_room(self) -> None:
        """Free the reserve when nothing else is left; to be called before each write that must
        succeed on a full disk. Costs one statvfs."""
        if self._reserve is not None:
            with suppress(OSError):
                disk = os.statvfs(self._reserve.parent)
                if _free(disk) < _reserve_of(disk) // 4:
                    self.release()

    def release(self) -> None:
        """Free the reserve, if it is held."""
        if self._reserve is None:
            return
        with suppress(OSError):  # not held, or a folder that cannot be used: nothing to free
            self._reserve.unlink()
            self.reserved = 0
            _log.error("the disk is full: freed the reserve, which deletes may use")

    def sample(self) -> None:
        """Measure the free bytes, warn of a disk that is nearly full, and allocate the reserve when
        there is room for it; to be called every ``SAMPLE_EVERY_S``. Never raises."""
        for name, folder in self._folders.items():
            try:
                free, floor = self._room(folder)
            except OSError:
                self.free.pop(name, None)
                continue
            self.free[name] = free
            self._warn(folder, free, floor)
        if self._reserve is not None:
            self._hold_reserve(self._reserve)

    def _hold_reserve(self, path: Path) -> None:
        with self._lock, suppress(OSError):
            remove_irregular(path)
            if path.exists():
                self.reserved = path.stat().st_blocks * 512
                return
            self.reserved = 0
            free, floor = self._room(path.parent)
            size = _reserve_of(os.statvfs(path.parent))
            if free < size + max(floor, size // 2):
                return
            _allocate(path, size)
            self.reserved = path.stat().st_blocks * 512

    # -- measuring ----

    def _room(self, folder: Path) -> tuple[int, int]:
        """Free bytes, and the floor, of the disk with ``folder``."""
        disk = os.statvfs(folder)
        floor = self._min_free
        if floor is None:
            floor = min(MAX_FLOOR_BYTES, int(disk.f_blocks * disk.f_frsize * FLOOR_SHARE))
        return _free(disk), floor

    def _missing_reserve(self, folder: Path) -> int:
        """Bytes of the disk with ``folder`` that are kept for the reserve while it is not held."""
        if self._reserve is None or self._reserve.exists():
            return 0
        same = folder.stat().st_dev == self._reserve.parent.stat().st_dev
        return _reserve_of(os.statvfs(folder)) if same else 0

    def _warn(self, folder: Path, free: int, floor: int) -> None:
        now = time.monotonic()
        if free >= 2 * floor or now - self._warned < _WARN_EVERY_S:
            return
        self._warned = now
        _log.warning(
            "%s: %d bytes are free; uploads are refused below %d (PREFIXD_MIN_FREE_BYTES)",
            folder,
            free,
            floor,
        )

    def _probe(self) -> StorageFault | None:
        """The fault that a write to the reserve's folder has now: the errno that SQLite hid."""
        if self._reserve is None:
            return None
        path = self._reserve.with_name(".probe")
        try:
            _write(path, _PROBE_BYTES)
        except OSError as error:
            return storage_fault(error)
        finally:
            with suppress(OSError):
                path.unlink()
        return None


class DiskWatch:
    """Samples a guard at intervals, in its own thread: a disk that hangs stops nothing else."""

    def __init__(self, guard: DiskGuard, *, interval_s: float = SAMPLE_EVERY_S) -> None:
        self._guard = guard
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixd-disk", daemon=True)

    def start(self) -> None:
        """Start the thread, which samples first."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; one that hangs in the disk is left."""
        self._stop.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while True:
            self._guard.sample()
            if self._stop.wait(self._interval_s):
                return


def _free(disk: os.statvfs_result) -> int:
    return disk.f_bavail * disk.f_frsize


def _reserve_of(disk: os.statvfs_result) -> int:
    return min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 4)


def _allocate(path: Path, size: int) -> None:
    """Make the reserve file, of real blocks: a sparse file would reserve nothing.

    More is allocated first and cut off again, so that a reserve freed by a quota, which statvfs may
    not show, is not made again until there is room for more than itself.
    """
    making = path.with_name(f".{path.name}")  # one name, so that an interrupted one is reused
    try:
        descriptor = _open(making)
        try:
            os.posix_fallocate(descriptor, 0, size + size // 2)
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        making.replace(path)
        fsync_directory(path.parent)
    finally:
        making.unlink(missing_ok=True)


def _write(path: Path, size: int) -> None:
    descriptor = _open(path)
    try:
        os.write(descriptor, bytes(size))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a file of ours for writing: not a pipe, which would block, nor a link to another."""
    remove_irregular(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(path, flags, 0o600)
