"""What ``prefixd doctor`` reports of the kernels that serve."""

from importlib.metadata import PackageNotFoundError
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
    text = native_kernels.describe_kernels(Settings(data_dir=tmp_path), device="cpu")
    assert text.startswith(
        "torch alone, no native kernels: nothing is compiled; CXX names 'absent'"
    )
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is avx2, but nothing is compiled"):
        native_kernels.describe_kernels(
            Settings(data_dir=tmp_path, cpu_kernels="avx2"), device="cpu"
        )


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(("choice", "named"), [("auto", "the native library"), ("avx2", "avx2")])
def test_a_missing_library_is_compiled_by_the_next_start(
    choice: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = SimpleNamespace(version="g++ 12")
    monkeypatch.setattr(native_kernels, "compiler_or", lambda _: compiler)
    text = native_kernels.describe_kernels(
        Settings(data_dir=tmp_path, cpu_kernels=choice), device="cpu"
    )
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
    assert (
        native_kernels.describe_kernels(Settings(data_dir=tmp_path, **settings), device="cpu")
        == text
    )


@pytest.mark.usefixtures("library")
def test_kernels_that_cannot_serve_have_the_reason_of_a_start(tmp_path: Path) -> None:
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is amx, but this processor lacks it"):
        native_kernels.describe_kernels(
            Settings(data_dir=tmp_path, cpu_kernels="amx"), device="cpu"
        )


def test_on_a_gpu_the_kernels_are_not_those_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(choice: Any = "auto") -> str:
        return native_kernels.describe_kernels(
            Settings(data_dir=tmp_path, cpu_kernels=choice), device="cuda:0"
        )

    monkeypatch.setattr(native_kernels, "version", lambda _: "3.6.0")
    assert describe() == "paged (Triton 3.6.0), compiled at the first start with a model"
    assert describe("module") == "module, no kernels of its own: cpu_kernels is module"
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is avx2 and the device cuda:0"):
        describe("avx2")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(native_kernels, "version", missing)
    assert describe() == "module, no kernels of its own: Triton is not installed"
