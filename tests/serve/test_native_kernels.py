"""What ``prefixd doctor`` reports of the native kernels."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from prefixd.server.model.cpu.library import LibraryUnavailable
from prefixd.server.serve import native_kernels
from prefixd.server.serve.settings import Settings


def test_a_missing_library_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_library(data_folder: Path) -> object:
        raise LibraryUnavailable(f"nothing in {data_folder}")

    monkeypatch.setattr(native_kernels, "find_library", find_library)
    text = native_kernels.describe_kernels(Settings(data_dir=tmp_path))
    assert text == f"torch alone, no native library: nothing in {tmp_path}"


def test_the_fastest_kernels_are_named_and_why_others_do_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"portable": "available", "avx2": "available", "amx": "this processor lacks it"}
    library = SimpleNamespace(
        kernels=("portable", "avx2"),
        states=lambda: states,
        origin="prefixd-cpu",
        path=Path("/lib.so"),
    )
    monkeypatch.setattr(native_kernels, "find_library", lambda _: library)
    assert native_kernels.describe_kernels(Settings(data_dir=tmp_path)) == (
        "avx2 (prefixd-cpu, /lib.so); slower ones: portable; not amx: this processor lacks it"
    )
