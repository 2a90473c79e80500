"""The folder for uploads in flight at the start of a server."""

import os
from pathlib import Path

import pytest

from prefixd.server.serve.build import prepare_upload_folder

DAYS_AGO = 1_000_000_000


def interrupted(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(b"half of a prefix")
    os.utime(path, (DAYS_AGO, DAYS_AGO))
    return path


def test_only_old_uploads_are_deleted(tmp_path: Path) -> None:
    folder = prepare_upload_folder(tmp_path)
    old, other = interrupted(folder, "upload-old"), interrupted(folder, "notes")
    running = folder / "upload-running"
    running.write_bytes(b"")
    assert prepare_upload_folder(tmp_path) == folder
    assert [path.exists() for path in (old, other, running)] == [False, True, True]


def test_upload_that_another_server_deletes_meanwhile_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_upload_folder(tmp_path)
    old = interrupted(folder, "upload-old")
    monkeypatch.setattr(Path, "glob", lambda *_: iter([folder / "upload-gone", old]))
    prepare_upload_folder(tmp_path)
    assert not old.exists()
