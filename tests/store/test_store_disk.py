"""The floor of free bytes and the reserve file, on a disk whose free bytes a test sets."""

import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixd.store.disk import MIB, RESERVE_BYTES, RESERVE_FILE, DiskGuard
from prefixd.store.errors import StorageFull
from prefixd.store.faults import StorageFault, storage_fault
from prefixd.store.files import make_directories

GIB = 1024 * MIB
BLOCK = 4096


@dataclass
class FakeDisk:
    """What statvfs reports, with the reserve taken off the free bytes."""

    folder: Path
    size: int = 10 * GIB
    free: int = 5 * GIB

    def __call__(self, _path: Path) -> Any:
        reserve = self.folder / RESERVE_FILE
        free = self.free - (reserve.stat().st_size if reserve.exists() else 0)
        return SimpleNamespace(
            f_bavail=free // BLOCK, f_blocks=self.size // BLOCK, f_frsize=BLOCK, f_files=0
        )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDisk:
    fake = FakeDisk(tmp_path)
    monkeypatch.setattr(os, "statvfs", fake)
    return fake


def guard_of(folder: Path, min_free: int | None = None) -> DiskGuard:
    return DiskGuard({"data": folder}, min_free=min_free, reserve=folder)


def refuses(check: Callable[[], None]) -> bool:
    try:
        check()
    except StorageFull:
        return True
    return False


def test_the_reserve_is_allocated_freed_and_allocated_again(tmp_path: Path, fake: FakeDisk) -> None:
    guard, reserve = guard_of(tmp_path), tmp_path / RESERVE_FILE
    guard.sample()
    status = reserve.stat()
    assert status.st_size == RESERVE_BYTES == 16 * MIB
    assert status.st_blocks * 512 >= RESERVE_BYTES  # not sparse
    assert guard.reserved >= RESERVE_BYTES
    guard.make_room()
    assert reserve.exists()
    fake.free = RESERVE_BYTES + 4 * MIB - BLOCK
    guard.make_room()
    assert not reserve.exists()
    assert guard.reserved == 0
    guard.sample()
    assert not reserve.exists()  # not in turns with the writes that need its room
    fake.free = RESERVE_BYTES + 256 * MIB
    guard.sample()
    assert reserve.exists()
    assert sorted(tmp_path.iterdir()) == [reserve]


@pytest.mark.parametrize(
    ("size", "min_free", "floor"),
    [
        (10 * GIB, None, 256 * MIB),
        (1 * GIB, None, GIB // 20),
        (10 * GIB, 8 * MIB, 8 * MIB),
        (10 * GIB, 0, 0),
    ],
    ids=["256 MiB", "5 percent", "a setting", "none"],
)
def test_uploads_stop_at_the_floor(
    tmp_path: Path, fake: FakeDisk, size: int, min_free: int | None, floor: int
) -> None:
    guard = guard_of(tmp_path, min_free)
    guard.sample()
    fake.size, fake.free = size, RESERVE_BYTES + floor + BLOCK
    assert not refuses(guard.check)
    fake.free -= 2 * BLOCK
    assert refuses(guard.check)


def test_uploads_do_not_take_the_room_of_a_freed_reserve(tmp_path: Path, fake: FakeDisk) -> None:
    guard = guard_of(tmp_path, 0)
    guard.sample()
    guard.release()
    fake.free = RESERVE_BYTES - BLOCK
    assert refuses(guard.check)
    fake.free = 2 * RESERVE_BYTES
    assert not refuses(guard.check)


def test_a_small_disk_has_a_small_reserve(tmp_path: Path, fake: FakeDisk) -> None:
    fake.size, fake.free = 20 * MIB, 18 * MIB
    guard_of(tmp_path).sample()
    assert (tmp_path / RESERVE_FILE).stat().st_size == 5 * MIB


def test_a_quota_that_statvfs_does_not_show_leaves_no_partial_reserve(
    tmp_path: Path, fake: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exceeded(*_args: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", exceeded)
    guard = guard_of(tmp_path)
    guard.sample()
    assert list(tmp_path.iterdir()) == []
    assert guard.reserved == 0
    assert fake.free == guard.free["data"]


def test_the_log_warns_at_twice_the_floor_once_a_minute(
    tmp_path: Path,
    fake: FakeDisk,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("prefixd.store.disk.time", SimpleNamespace(monotonic=lambda: clock.now))
    guard = guard_of(tmp_path)
    with caplog.at_level(logging.WARNING, logger="prefixd.disk"):
        guard.sample()
        assert caplog.messages == []
        fake.free = RESERVE_BYTES + 512 * MIB - BLOCK
        counts = []
        for clock.now in (100.0, 110.0, 161.0):
            guard.sample()
            counts.append(len(caplog.messages))
    assert counts == [1, 1, 2]
    assert "PREFIXD_MIN_FREE_BYTES" in caplog.messages[0]


def test_a_folder_that_is_gone_is_no_longer_measured(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    guard = guard_of(folder)
    guard.sample()
    assert guard.free["data"] > 0
    (folder / RESERVE_FILE).unlink(missing_ok=True)
    folder.rmdir()
    guard.sample()
    guard.make_room()
    assert guard.free == {}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [RESERVE_FILE, f".{RESERVE_FILE}", ".probe"])
@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "folder"])
def test_reserve_is_held_in_place_of_what_is_no_regular_file(
    tmp_path: Path, fake: FakeDisk, name: str, kind: str
) -> None:
    target = tmp_path / "target"
    target.write_text("unchanged")
    match kind:
        case "pipe":
            os.mkfifo(tmp_path / name)
        case "link":
            (tmp_path / name).symlink_to(target)
        case "dangling link":
            (tmp_path / name).symlink_to(tmp_path / "gone")
        case _:
            (tmp_path / name).mkdir()
    guard = guard_of(tmp_path)
    guard.sample()
    assert guard.reserved == RESERVE_BYTES
    hidden = sqlite3.OperationalError("disk I/O error")
    hidden.sqlite_errorcode = sqlite3.SQLITE_IOERR
    assert guard.fault_of(hidden) is StorageFault.FAILED
    assert target.read_text() == "unchanged"
    guard.release()
    assert not (tmp_path / RESERVE_FILE).exists()


@pytest.mark.parametrize(
    "number",
    [errno.EUCLEAN, errno.EBADMSG, errno.ESHUTDOWN, errno.ENOTCONN, errno.ELOOP, errno.EREMOTEIO],
)
def test_errors_of_a_failing_file_system_are_faults(number: int) -> None:
    assert storage_fault(OSError(number, os.strerror(number))) is StorageFault.FAILED


@pytest.mark.parametrize("kind", ["file", "pipe", "link"])
def test_something_else_in_place_of_a_folder_is_a_fault(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "acme"
    match kind:
        case "file":
            place.write_text("")
        case "pipe":
            os.mkfifo(place)
        case _:
            place.symlink_to(tmp_path / "gone")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a") as refused:
        make_directories(place / "3a")
    assert storage_fault(refused.value) is StorageFault.FAILED
