"""A data folder that cannot be used: every verb that needs it ends with status 1 and a message,
before anything is loaded."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.cli_runner import run
from tests.faults.faults_disk import MIB, remount, small_disk

OTHER = 65534
VERBS = (
    ("serve", "--model", "no-such-model"),
    ("doctor",),
    ("tenant", "ls"),
    ("gc",),
    ("migrate",),
    ("copy", "--to-data-dir", "elsewhere"),
)
each_verb = pytest.mark.parametrize("verb", VERBS, ids=[verb[0] for verb in VERBS])


@pytest.fixture(autouse=True)
def folder_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # It would send the log lines of later tests to this test's standard error, which is closed.
    monkeypatch.setattr("prefixd.server.serve.logging.configure", lambda *_: None)


def check_refused(verb: tuple[str, ...], data: Path, *found: str) -> None:
    result = run(*verb, "--data-dir", str(data), code=1)
    output = " ".join(result.output.split())
    assert f"expected the data folder {data} to be writable" in output
    for words in found:
        assert words in output
    assert "Traceback" not in output


@each_verb
def test_a_file_in_place_of_the_data_folder(tmp_path: Path, verb: tuple[str, ...]) -> None:
    data = tmp_path / "data"
    data.write_text("not a folder")
    check_refused(verb, data, "it is a file")


@each_verb
def test_a_data_folder_without_its_parent(tmp_path: Path, verb: tuple[str, ...]) -> None:
    data = tmp_path / "mount" / "data"
    check_refused(verb, data, f"there is no folder {data.parent}", "mounted?")
    assert not data.parent.exists()


def test_a_link_whose_target_is_gone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.symlink_to(tmp_path / "gone")
    check_refused(("doctor",), data, f"link to {tmp_path / 'gone'}, which is gone")


@each_verb
def test_a_read_only_disk(tmp_path: Path, verb: tuple[str, ...]) -> None:
    with small_disk(tmp_path / "disk", size=MIB) as disk:
        data = disk.root / "data"
        data.mkdir()
        remount(disk.root, "ro")
        check_refused(verb, data, f"the disk of {data} is mounted read-only")
        check_refused(verb, disk.root / "new", f"the disk of {disk.root} is mounted read-only")


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that this process, without the privileges of root, may read and not write; with
    them it is another user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, OTHER, OTHER)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o777)


def run_unprivileged(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a verb without root's privilege to write anywhere."""
    command = [sys.executable, "-P", "-m", "prefixd.server", *arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv of util-linux to drop root's privileges")
        command = ["setpriv", "--bounding-set", "-dac_override", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_of_another_user(foreign: Path) -> None:
    result = run_unprivileged("serve", "--model", "no-such-model", "--data-dir", str(foreign))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == (
        f"prefixd: expected the data folder {foreign} to be writable; "
        f"{foreign} belongs to user {foreign.stat().st_uid} with mode 0555, and this is user "
        f"{os.geteuid()}"
    )


def test_a_catalog_of_another_user_in_a_writable_folder(foreign: Path) -> None:
    foreign.chmod(0o777)
    catalog = foreign / "catalog.sqlite3"
    catalog.touch(0o444)
    result = run_unprivileged("tenant", "ls", "--data-dir", str(foreign))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"; {catalog} belongs to user {os.geteuid()} with mode 0444, and this is" in line


def test_a_new_folder_in_an_existing_one_is_made(tmp_path: Path) -> None:
    run("tenant", "ls", "--data-dir", str(tmp_path / "data"))
    assert (tmp_path / "data" / "catalog.sqlite3").is_file()


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("catalog.sqlite3", "pipe", "is no regular file"),
        ("catalog.sqlite3", "folder", "is no regular file"),
        ("catalog.sqlite3", "link", "which is gone"),
        ("blobs", "file", "is no folder"),
        ("blobs", "link", "is no folder"),
        ("uploads", "pipe", "is no folder"),
        ("blobs/.tmp", "file", "is no folder"),
    ],
)
def test_something_else_in_the_data_folder(
    tmp_path: Path, name: str, kind: str, found: str
) -> None:
    data = tmp_path / "data"
    path = data / name
    path.parent.mkdir(parents=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "gone")
        case _:
            path.write_text("")
    check_refused(("tenant", "ls"), data, found)
