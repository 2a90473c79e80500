"""The native library of this checkout, for tests: the installed one, else compiled once."""

import platform
import sys
from functools import cache
from pathlib import Path

import pytest

from prefixd.server.model.cpu.build import SOURCES, BuildFailed, find_compiler
from prefixd.server.model.cpu.library import NativeLibrary, find_or_compile_library

COMPILED = Path(__file__).parents[3] / "build"


@cache
def native_library(folder: Path = COMPILED, sources: Path = SOURCES) -> NativeLibrary:
    """The library; the test is skipped only on a system that cannot have one, and fails with the
    reason where it should compile and does not."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("the native library needs Linux with glibc")
    try:
        find_compiler()
    except BuildFailed as error:
        pytest.skip(f"no native library: {error}")
    folder.mkdir(exist_ok=True)
    return find_or_compile_library(folder, sources=sources)
