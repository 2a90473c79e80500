"""The native library of this checkout, for tests: the installed one, else compiled once."""

from functools import cache
from pathlib import Path

import pytest

from prefixd.server.model.cpu.library import (
    LibraryUnavailable,
    NativeLibrary,
    find_or_compile_library,
)

COMPILED = Path(__file__).parents[3] / "build"


@cache
def native_library() -> NativeLibrary:
    """The library; the test is skipped with the reason where there is none."""
    COMPILED.mkdir(exist_ok=True)
    try:
        return find_or_compile_library(COMPILED)
    except LibraryUnavailable as error:
        pytest.skip(f"no native library: {error}")
