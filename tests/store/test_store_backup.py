"""``prefixd backup`` and ``prefixd restore``: complete under load, and never half of one."""

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prefixd.server.cli.main import app
from prefixd.store import backup as backup_module
from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.names import BlobKey
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.test_store_copy import Opened, opened, sqlite_url


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def run_json(*words: str, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code).stdout)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Opened]:
    """SQLite and files in ``home``, with versions, an alias, a pin and a deleted prefix."""
    with opened(sqlite_url(tmp_path / "home"), None, tmp_path / "home") as source:
        source.tenants.create_tenant("acme")
        source.tenants.create_key(tenant="acme")
        for name, text in (
            ("style", "one"),
            ("style", "two"),
            ("other", "three"),
            ("gone", "four"),
        ):
            source.publish(name, text)
        changes.set_alias(source.store, tenant="acme", name="style", alias="prod", version=1)
        changes.set_pin(source.store, tenant="acme", reference="style@prod", creator="k1")
        changes.delete(source.store, tenant="acme", name="gone")
        yield source


def words_of(tmp_path: Path) -> tuple[str, ...]:
    return ("backup", str(tmp_path / "backup"), "--data-dir", str(tmp_path / "home"))


def restore_words(tmp_path: Path) -> tuple[str, ...]:
    return ("restore", str(tmp_path / "backup"), "--data-dir", str(tmp_path / "restored"))


def blob_path(folder: Path, key: BlobKey) -> Path:
    return folder / "blobs" / key.place


def tree(folder: Path) -> dict[str, str]:
    """The digest of each file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_integrity(*flags: str) -> None:
    run("doctor", "--integrity", *flags)


def test_a_backup_restores_every_row_and_blob(home: Opened, tmp_path: Path) -> None:
    done = run_json(*words_of(tmp_path))
    assert (done["blobs"], done["corrupt"]) == (3, [])
    backup = tmp_path / "backup"
    before = tree(backup)
    assert {"backup.json", "catalog.sqlite3"} < set(before)
    assert not {name for name in before if name.endswith(("-wal", "-shm"))}
    restored = run_json(*restore_words(tmp_path))
    assert restored["rows"] == done["rows"] | {"blobs": 3}  # the deleted one was not copied
    assert restored["blobs"] == 3
    assert tree(backup) == before  # it was only read
    with opened(sqlite_url(tmp_path / "restored"), None, tmp_path / "restored") as copy:
        expected = home.rows()
        expected["blobs"] = [row for row in expected["blobs"] if row[3] is None]
        assert copy.rows() == expected
        assert copy.texts() == home.texts() == {"style": "two", "other": "three"}
    check_integrity("--data-dir", str(tmp_path / "restored"))


@pytest.mark.slow
def test_postgres_and_s3_are_backed_up_to_files_and_restored(
    home: Opened, postgres_url: str, s3_url: str, tmp_path: Path
) -> None:
    words = words_of(tmp_path)
    remote = ("--database-url", postgres_url, "--blobs-url", s3_url)
    run(*words)
    run("restore", str(tmp_path / "backup"), "--data-dir", str(tmp_path / "replica"), *remote)
    again = tmp_path / "again"
    run("backup", str(again), "--data-dir", str(tmp_path / "replica"), *remote)
    run("restore", str(again), "--data-dir", str(tmp_path / "restored"))
    with opened(sqlite_url(tmp_path / "restored"), None, tmp_path / "restored") as copy:
        expected = home.rows()
        expected["blobs"] = [row for row in expected["blobs"] if row[3] is None]
        assert copy.rows() == expected
        assert copy.texts() == home.texts()
    check_integrity("--data-dir", str(tmp_path / "restored"))


def test_a_backup_under_load_has_everything_acknowledged_before_it(
    home: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers publish, delete and collect while the blobs are copied."""
    stop, enough, more = threading.Event(), threading.Event(), threading.Event()
    acknowledged = list[str]()

    def write(writer: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            name = f"w{writer}-{number}"
            home.publish(name, f"text of {name}")
            if number % 3 == 0:
                changes.delete(home.store, tenant="acme", name=name)
            else:
                acknowledged.append(name)
                more.set()
            if len(acknowledged) > 10:
                enough.set()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    put, during = LocalBlobs.put, list[str]()

    def put_while_others_write(*args: Any, **named: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            more.clear()
            assert more.wait(60)
            during.append(acknowledged[-1])
        put(*args, **named)

    for thread in writers:
        thread.start()
    try:
        assert enough.wait(60)
        before = list(acknowledged)
        with monkeypatch.context() as patch:
            patch.setattr(LocalBlobs, "put", put_while_others_write)
            run(*words_of(tmp_path))
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    assert set(during) - set(before)  # others wrote while it was made
    run(*restore_words(tmp_path))
    with opened(sqlite_url(tmp_path / "restored"), None, tmp_path / "restored") as copy:
        texts = copy.texts()
        for name in before:
            assert texts[name] == f"text of {name}"
        assert texts["style"] == "two"
    check_integrity("--data-dir", str(tmp_path / "restored"))


@pytest.mark.parametrize("content", ["file", "folder", "link", "link to a folder"])
def test_a_backup_needs_a_new_or_empty_folder(home: Opened, tmp_path: Path, content: str) -> None:
    backup = tmp_path / "backup"
    match content:
        case "file":
            backup.write_text("notes")
        case "folder":
            backup.mkdir()
            (backup / "notes").touch()
        case _:
            if content == "link to a folder":
                (tmp_path / "elsewhere").mkdir()
            backup.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())
    result = run(*words_of(tmp_path), code=1)
    expected = "is a symbolic link" if "link" in content else "has something in it"
    assert f"{backup} {expected}" in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert home.texts()
    if content == "folder":
        (backup / "notes").unlink()
        run(*words_of(tmp_path))


def test_a_backup_needs_a_folder_to_be_in(home: Opened, tmp_path: Path) -> None:
    missing = tmp_path / "disk" / "today"
    result = run("backup", str(missing), "--data-dir", str(tmp_path / "home"), code=1)
    assert f"there is no folder {missing.parent} to make today in" in result.stderr
    assert home.texts()


@pytest.mark.parametrize("at", ["blob", "manifest"])
def test_an_interrupted_backup_is_no_backup(
    home: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """An error leaves nothing; a killed process (here: no removal) leaves a folder by another name
    that cannot be restored."""

    def interrupt(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    target = "_write_manifest" if at == "manifest" else "copy_store"
    before = sorted(tmp_path.iterdir())
    for killed in (False, True):
        with monkeypatch.context() as patch:
            if at == "blob":
                patch.setattr(LocalBlobs, "put", interrupt)
            else:
                patch.setattr(backup_module, target, interrupt)
            if killed:
                patch.setattr(shutil, "rmtree", lambda *_args, **_named: None)
            result = CliRunner().invoke(app, words_of(tmp_path))
        assert result.exit_code != 0
        assert not (tmp_path / "backup").exists()
        remaining = [path for path in sorted(tmp_path.iterdir()) if path not in before]
        assert len(remaining) == killed
    (partial,) = remaining
    assert partial.name.startswith("backup.partial-")
    refused = run("restore", str(partial), "--data-dir", str(tmp_path / "restored"), code=1)
    assert f"expected a finished backup in {partial}" in refused.stderr
    assert home.texts()
    run(*words_of(tmp_path))
    run(*restore_words(tmp_path))


def test_corrupt_blobs_are_named_and_the_exit_status_is_one(home: Opened, tmp_path: Path) -> None:
    manifest = home.store.resolve(tenant="acme", reference="other", base=BASE)
    key = BlobKey("acme", manifest.digest)
    blob_path(tmp_path / "home", key).write_bytes(b"changed")
    line = f"prefixd: not copied, corrupt or missing: acme {key.digest}"
    backup = run(*words_of(tmp_path), code=1)
    assert backup.stderr.splitlines() == [line]
    restored = run(*restore_words(tmp_path), code=1)  # all else is restored
    assert restored.stderr.splitlines() == [line]
    with opened(sqlite_url(tmp_path / "restored"), None, tmp_path / "restored") as copy:
        assert copy.store.resolve(tenant="acme", reference="other", base=BASE).corrupt
        assert copy.store.resolve(tenant="acme", reference="style", base=BASE).version == 2


@pytest.mark.parametrize(
    "damage",
    [
        "blob",
        "missing blob",
        "catalog",
        "missing catalog",
        "catalog pipe",
        "manifest",
        "no manifest",
        "manifest pipe",
        "manifest folder",
    ],
)
def test_a_damaged_backup_is_refused_and_nothing_is_restored(
    home: Opened, tmp_path: Path, damage: str
) -> None:
    run(*words_of(tmp_path))
    backup = tmp_path / "backup"
    manifest = home.store.resolve(tenant="acme", reference="other", base=BASE)
    blob = blob_path(backup, BlobKey("acme", manifest.digest))
    named = {
        "blob": f"acme {manifest.digest}",
        "missing blob": f"acme {manifest.digest}",
        "catalog": "catalog.sqlite3 has another digest",
        "missing catalog": "catalog.sqlite3 is missing",
        "catalog pipe": "catalog.sqlite3, got a pipe",
        "manifest": "backup.json is malformed",
        "manifest pipe": "backup.json, got a pipe",
        "manifest folder": "backup.json, got a folder",
        "no manifest": "expected a finished backup",
    }[damage]
    match damage:
        case "blob":
            blob.write_bytes(blob.read_bytes()[:-1])
        case "missing blob":
            blob.unlink()
        case "catalog":
            with (backup / "catalog.sqlite3").open("r+b") as file:
                file.seek(5000)
                file.write(b"\x00changed")
        case "manifest":
            (backup / "backup.json").write_text("{}")
        case _:
            file_name = "catalog.sqlite3" if "catalog" in damage else "backup.json"
            (backup / file_name).unlink()
            if "pipe" in damage:
                os.mkfifo(backup / file_name)
            if "folder" in damage:
                (backup / file_name).mkdir()
    result = run(*restore_words(tmp_path), code=1)
    assert named in " ".join(result.stderr.split())
    with opened(sqlite_url(tmp_path / "restored"), None, tmp_path / "restored") as target:
        assert not any(target.rows().values())
        assert list(target.blobs.walk()) == []
        assert not list((tmp_path / "restored").glob(".restore-*"))


def test_restore_refuses_a_store_with_something_in_it(home: Opened, tmp_path: Path) -> None:
    run(*words_of(tmp_path))
    run("tenant", "create", "beta", "--data-dir", str(tmp_path / "restored"))
    result = run(*restore_words(tmp_path), code=1)
    assert "expected an empty database to copy to" in result.stderr
    with opened(sqlite_url(tmp_path / "restored"), None, tmp_path / "restored") as target:
        assert [tenant.name for tenant in target.tenants.list_tenants()] == ["beta"]
    assert home.texts()
