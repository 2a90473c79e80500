"""Where the native library comes from: installed, compiled earlier, compiled now, or nowhere."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefixd.server.model.cpu.build import build_library, find_compiler, write_description
from prefixd.server.model.cpu.interface import ABI
from prefixd.server.model.cpu.library import (
    LibraryUnavailable,
    find_library,
    find_or_compile_library,
)
from tests.model.cpu.small_sources import make_compiler, make_sources

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not Linux with glibc"),
]

COMPILE_IN_A_PROCESS = """
import sys
from pathlib import Path
from prefixd.server.model.cpu.library import find_or_compile_library
print(find_or_compile_library(Path(sys.argv[1]), sources=Path(sys.argv[2])).path)
"""


@pytest.fixture(autouse=True)
def without_installed_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefixd.cpu", None)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return make_sources(tmp_path / "src")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def remove_compilers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))


def install(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    """Make a library that of ``prefixd-cpu``."""
    monkeypatch.setitem(sys.modules, "prefixd.cpu", SimpleNamespace(LIBRARY=library))


def test_library_is_compiled_once_and_found_again_without_a_compiler(
    sources: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(LibraryUnavailable, match="none is compiled in"):
        find_library(data, sources=sources)
    compiled = find_or_compile_library(data, sources=sources)
    assert compiled.origin == "compiled"
    assert find_library(data, sources=sources).path == compiled.path
    remove_compilers(monkeypatch, tmp_path / "empty")
    assert find_or_compile_library(data, sources=sources).path == compiled.path
    modes = {path.name: path.stat().st_mode & 0o777 for path in (data / "native").iterdir()}
    assert (data / "native").stat().st_mode & 0o777 == 0o700
    assert set(modes) == {"lock", compiled.path.name, compiled.path.with_suffix(".json").name}
    assert not any(mode & 0o022 for mode in modes.values())


def test_other_sources_and_another_compiler_are_compiled_again(
    sources: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = find_or_compile_library(data, sources=sources).path
    (sources / "isa_portable.cpp").write_text("int changed = 1;\n")
    second = find_or_compile_library(data, sources=sources).path
    newer = 'case "$*" in *--version*) echo "g++ 99"; exit;; esac'
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path / "bin", newer)))
    third = find_or_compile_library(data, sources=sources)
    assert len({first, second, third.path}) == 3
    assert third.built.compiler == "g++ 99"
    assert list((data / "native").glob("*.so")) == [third.path]


def test_processes_that_start_at_once_compile_once(
    sources: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "log"
    count = f'case "$*" in *-shared*) echo linked >> {log};; esac'
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path / "bin", count)))
    command = [sys.executable, "-c", COMPILE_IN_A_PROCESS, str(data), str(sources)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert log.read_text().count("linked") == 1


def test_remains_of_an_interrupted_build_are_removed(sources: Path, data: Path):
    remains = data / "native" / "build-interrupted"
    remains.mkdir(parents=True, mode=0o700)
    (data / "native").chmod(0o700)
    (remains / "half.o").write_bytes(b"x")
    find_or_compile_library(data, sources=sources)
    assert not remains.exists()


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF"], ids=["half", "empty", "head"])
def test_damaged_library_is_compiled_again(content: bytes | None, sources: Path, data: Path):
    path = find_or_compile_library(data, sources=sources).path
    good = path.read_bytes()
    path.unlink()  # a new file: the old one is loaded in this process
    path.write_bytes(good[: len(good) // 2] if content is None else content)
    with pytest.raises(LibraryUnavailable, match="differs from what was built"):
        find_library(data, sources=sources)
    assert find_or_compile_library(data, sources=sources).path == path
    assert path.stat().st_size > len(good) // 2


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_folder_that_others_write_is_refused(mode: int, sources: Path, data: Path):
    find_or_compile_library(data, sources=sources)
    (data / "native").chmod(mode)
    with pytest.raises(LibraryUnavailable, match=f"alone, it is of user .*, mode {mode:04o}"):
        find_or_compile_library(data, sources=sources)


def test_folder_of_another_user_is_refused(
    sources: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    find_or_compile_library(data, sources=sources)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(LibraryUnavailable, match=f"writable for user {user} alone"):
        find_or_compile_library(data, sources=sources)


def test_library_that_others_write_is_refused(sources: Path, data: Path):
    path = find_or_compile_library(data, sources=sources).path
    path.chmod(0o602)
    with pytest.raises(LibraryUnavailable, match="mode 0602"):
        find_library(data, sources=sources)


def test_folder_that_is_a_link_is_refused(sources: Path, data: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (data / "native").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LibraryUnavailable, match="expected a folder or file, got a link"):
        find_or_compile_library(data, sources=sources)


def test_data_folder_without_execution_is_a_reason_before_anything_is_compiled(
    sources: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.statvfs(data).f_flag
    status = SimpleNamespace(f_flag=real | os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda _folder: status)
    with pytest.raises(LibraryUnavailable, match=r"native: .* it is mounted noexec"):
        find_or_compile_library(data, sources=sources)
    assert not list((data / "native").iterdir())


def test_data_folder_that_is_a_file_is_a_reason(sources: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LibraryUnavailable, match="Not a directory"):
        find_or_compile_library(tmp_path / "file", sources=sources)


def test_every_reason_is_named_where_there_is_no_compiler(
    sources: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    remove_compilers(monkeypatch, tmp_path / "empty")
    with pytest.raises(LibraryUnavailable) as raised:
        find_or_compile_library(data, sources=sources)
    message = str(raised.value)
    assert "prefixd-cpu is not installed" in message
    assert "no C++ compiler" in message
    assert "\n" not in message
    assert not (data / "native").exists()


def test_first_compile_error_is_the_reason(sources: Path, data: Path):
    (sources / "wrong.cpp").write_text("int x = undefined_name;\n")
    with pytest.raises(LibraryUnavailable, match=r"wrong\.cpp: .*error: .undefined_name"):
        find_or_compile_library(data, sources=sources)


def test_compiler_for_another_processor_is_not_used(
    sources: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    script = f'case "$*" in *-dumpmachine*) echo {other}-linux-gnu; exit;; esac'
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path / "bin", script)))
    with pytest.raises(LibraryUnavailable, match=f"compiler for {platform.machine()}, got {other}"):
        find_or_compile_library(data, sources=sources)


def test_installed_library_of_the_same_sources_is_used_first(
    sources: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = find_or_compile_library(data, sources=sources).path
    path = tmp_path / "installed.so"
    write_description(path, build_library(path, compiler=find_compiler(), sources=sources))
    install(monkeypatch, path)
    library = find_library(data, sources=sources)
    assert (library.origin, library.path) == ("prefixd-cpu", path)
    (sources / "isa_portable.cpp").write_text("int changed = 1;\n")
    with pytest.raises(LibraryUnavailable, match=r"prefixd-cpu: .* was built from sources"):
        find_library(data, sources=sources)
    again = find_or_compile_library(data, sources=sources)
    assert (again.origin, again.path != compiled) == ("compiled", True)


def test_another_interface_is_refused(data: Path, tmp_path: Path):
    sources = make_sources(tmp_path / "other", abi=99)
    with pytest.raises(LibraryUnavailable, match=f"expected interface {ABI}, got 99"):
        find_or_compile_library(data, sources=sources)


def test_library_without_a_function_is_refused(sources: Path, data: Path):
    text = (sources / "functions.cpp").read_text().replace("pfx_run", "pfx_walk")
    (sources / "functions.cpp").write_text(text)
    with pytest.raises(LibraryUnavailable, match="undefined symbol: pfx_run"):
        find_or_compile_library(data, sources=sources)


@pytest.mark.parametrize("system", ["macos", "musl"])
def test_other_systems_are_a_reason(
    system: str, sources: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    if system == "macos":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    expected = {"macos": "expected Linux, this is darwin", "musl": "expected glibc"}[system]
    with pytest.raises(LibraryUnavailable, match=expected):
        find_or_compile_library(data, sources=sources)
    assert not list(data.iterdir())


def test_states_say_which_kernels_serve_and_why_others_do_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has optional kernel sets")
    refuse = 'case "$*" in *-mamx-tile*) echo "g++: error: no -mamx-tile" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path / "bin", refuse)))
    sources = make_sources(tmp_path / "sets", sets=("portable", "avx2", "avx512", "amx"))
    library = find_or_compile_library(data, sources=sources)
    assert library.kernels == ("portable", "avx2")
    states = library.states()
    assert [states[name] for name in ("portable", "avx2")] == ["available", "available"]
    assert states["avx512"] == "this processor lacks it"
    assert states["amx"].endswith("g++: error: no -mamx-tile")
