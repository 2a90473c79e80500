"""What ``prefixd doctor`` reports of the native kernels."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixd.server.model.cpu.library import LibraryUnavailable
from prefixd.server.model.decoders import DecoderUnavailable
from prefixd.server.serve import native_kernels
from prefixd.server.serve.settings import Settings


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_library(data_folder: Path) -> object:
        raise LibraryUnavailable("nothing is compiled")

    monkeypatch.setattr(native_kernels, "find_library", find_library)


@pytest.mark.usefixtures("no_library")
def test_a_missing_library_without_a_compiler_is_reported_with_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "absent")
    text = native_kernels.describe_kernels(Settings(data_dir=tmp_path))
    assert text.startswith(
        "torch alone, no native kernels: nothing is compiled; CXX names 'absent'"
    )
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is avx2, but nothing is compiled"):
        native_kernels.describe_kernels(Settings(data_dir=tmp_path, cpu_kernels="avx2"))


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(("choice", "named"), [("auto", "the native library"), ("avx2", "avx2")])
def test_a_missing_library_is_compiled_by_the_next_start(
    choice: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = SimpleNamespace(version="g++ 12")
    monkeypatch.setattr(native_kernels, "compiler_or", lambda _: compiler)
    text = native_kernels.describe_kernels(Settings(data_dir=tmp_path, cpu_kernels=choice))
    assert text == f"{named}, which the next start compiles with g++ 12: nothing is compiled"


STATES = {
    "portable": "available",
    "avx512": "available",
    "avx512_bf16": "available",
    "amx": "this processor lacks it",
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        kernels=("portable", "avx512", "avx512_bf16"),
        states=lambda: dict(STATES),
        origin="prefixd-cpu",
        path=Path("/lib.so"),
    )
    monkeypatch.setattr(native_kernels, "find_library", lambda _: library)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"dtype": "bfloat16"},
            (
                "avx512_bf16 (prefixd-cpu, /lib.so); slower ones: portable, avx512; "
                "not amx: this processor lacks it"
            ),
        ),
        (
            {},
            (
                "avx512 (prefixd-cpu, /lib.so); slower ones: portable; "
                "not avx512_bf16: faster in bfloat16 alone; not amx: this processor lacks it"
            ),
        ),
        (
            {"cpu_kernels": "portable"},
            (
                "portable (prefixd-cpu, /lib.so); slower ones: none; "
                "not avx512: cpu_kernels is portable; not avx512_bf16: cpu_kernels is portable; "
                "not amx: this processor lacks it"
            ),
        ),
        ({"cpu_kernels": "torch"}, "torch, no native kernels: cpu_kernels is torch"),
        ({"tensor_parallel": 2}, "module, no native kernels: tensor_parallel is 2"),
        (
            {"dtype": "float16"},
            (
                "torch alone, no native kernels: the dtype is torch.float16; "
                "expected float32 or bfloat16"
            ),
        ),
    ],
)
def test_the_kernels_that_serve_are_named_and_why_others_do_not(
    settings: dict[str, Any], text: str, tmp_path: Path
) -> None:
    assert native_kernels.describe_kernels(Settings(data_dir=tmp_path, **settings)) == text


@pytest.mark.usefixtures("library")
def test_kernels_that_cannot_serve_have_the_reason_of_a_start(tmp_path: Path) -> None:
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is amx, but this processor lacks it"):
        native_kernels.describe_kernels(Settings(data_dir=tmp_path, cpu_kernels="amx"))
