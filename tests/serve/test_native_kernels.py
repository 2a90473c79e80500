"""What ``prefixd doctor`` reports of the native kernels."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixd.server.model.cpu.library import LibraryUnavailable
from prefixd.server.model.decoders import DecoderUnavailable
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
