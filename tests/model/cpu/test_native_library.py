"""The tests of the native library are skipped only on systems that cannot have one."""

import platform
import shutil
import sys
from pathlib import Path

import pytest

from prefixd.server.model.cpu.library import LibraryUnavailable
from tests.model.cpu.native_library import native_library
from tests.model.cpu.small_sources import make_sources


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not Linux with glibc")
def test_sources_that_do_not_compile_fail_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "prefixd.cpu", None)
    sources = make_sources(tmp_path / "src")
    (sources / "wrong.cpp").write_text("int x = undefined_name;\n")
    with pytest.raises(LibraryUnavailable, match=r"wrong\.cpp"):
        native_library(tmp_path / "data", sources)


def test_no_compiler_skips_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prefixd.cpu", None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="no C"):
        native_library(tmp_path / "data")
