"""The folder for uploads in flight at the start of a server."""

from pathlib import Path

import pytest

from prefixd.server.serve.sweeper import prepare_upload_folder
from prefixd.store.files import UPLOAD_PREFIX, file_in_progress


def interrupted(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(b"half of a prefix")
    return path


def test_interrupted_uploads_are_deleted_and_running_ones_are_not(tmp_path: Path) -> None:
    folder = prepare_upload_folder(tmp_path)
    old, other = interrupted(folder, "upload-old"), interrupted(folder, "notes")
    with file_in_progress(folder, prefix=UPLOAD_PREFIX) as (running, _):
        assert prepare_upload_folder(tmp_path) == folder
        assert [path.exists() for path in (old, other, running)] == [False, True, True]
    assert not running.exists()


def test_upload_that_another_server_deletes_meanwhile_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_upload_folder(tmp_path)
    old = interrupted(folder, "upload-old")
    monkeypatch.setattr(Path, "iterdir", lambda _: iter([folder / "upload-gone", old]))
    prepare_upload_folder(tmp_path)
    assert not old.exists()
