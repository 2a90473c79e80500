"""The native decoder gives the model's logits, on every set of kernels that is available here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Step
from prefixd.server.model import decoders
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoders import DecoderUnavailable, choose_decoder, make_decoder
from prefixd.server.model.native import NativeDecoder
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import self_check
from tests.model.cpu.native_library import native_library
from tests.model.test_decoders import EXACT, POOL, base_of, check_nan_stays

pytestmark = pytest.mark.slow  # compiles the library where it is not installed


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library()
    monkeypatch.setattr(decoders, "find_or_compile_library", lambda _folder: library)


def _require(kernels: str) -> None:
    state = native_library().states()[kernels]
    if state != "available":
        pytest.skip(f"{kernels}: {state}")


def _checked(family: str, kernels: str, dtype: str, folder: Path) -> Decoder:
    base = base_of(family, dtype)
    evidence = self_check(base, block_size=16, prefill_chunk=16).evidence
    return choose_decoder(
        lambda: base_of(family, dtype), base, kernels, evidence=evidence, **POOL, data_folder=folder
    )


@pytest.mark.parametrize("family", EXACT)
def test_exact_families_are_native(family: str, tmp_path: Path) -> None:
    assert isinstance(_checked(family, "auto", "float32", tmp_path), NativeDecoder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_moe"])
def test_every_set_of_kernels_passes_the_check(
    family: str, kernels: str, dtype: str, tmp_path: Path
) -> None:
    _require(kernels)
    decoder = _checked(family, kernels, dtype, tmp_path)
    assert decoder.name == kernels
    held = [weight.numel() for weight in decoder.base.module.parameters()]  # type: ignore[attr-defined]
    assert sum(held) == 0


@pytest.mark.parametrize("kernels", KERNELS)
def test_nan_stays_in_its_own_sequence(kernels: str, tmp_path: Path) -> None:
    _require(kernels)
    check_nan_stays(make_decoder(base_of(), kernels, **POOL, data_folder=tmp_path))


def test_a_set_that_is_not_available_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    missing = [name for name in KERNELS if name not in native_library().kernels]
    if not missing:
        pytest.skip("all sets of kernels are available")
    with pytest.raises(DecoderUnavailable, match="available here: portable"):
        make_decoder(base_of(), missing[0], **POOL, data_folder=tmp_path)


def test_kv_is_read_as_it_was_written(tmp_path: Path) -> None:
    decoder = make_decoder(base_of(), "portable", **POOL, data_folder=tmp_path)
    shape: Any = decoder.base.shape  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(
        2 * shape.num_layers, 19, shape.num_kv_heads * shape.head_dim, generator=generator
    )
    decoder.write_kv([5, 3], 0, kv)
    decoder.write_kv([5, 3], 7, kv[:, 7:])
    assert torch.equal(decoder.read_kv([5, 3], 19), kv)


def test_greedy_and_sampled_rows_share_a_pass(tmp_path: Path) -> None:
    """The native best ids stay valid in a pass with rows that are drawn."""
    tokens = {}
    for kernels in ("torch", "portable"):
        runner = Runner(make_decoder(base_of(), kernels, **POOL, data_folder=tmp_path))
        chunks = [
            Chunk(0, [4, 5, 6], 0, [1], sampling=SamplingParams(temperature=0)),
            Chunk(1, [7, 8], 0, [2], sampling=SamplingParams(temperature=0.8), uniform=0.4),
        ]
        sampled = runner.run(Step(chunks=chunks, fresh=[1, 2])).sampled
        tokens[kernels] = {key: new[0].token_id for key, new in sampled.items()}
    assert tokens["portable"] == tokens["torch"]


def test_lean_layers_replace_a_wrong_native_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape_of = NativeDecoder._shape

    def spoiled(self: NativeDecoder, parts: Any) -> Any:
        shape = shape_of(self, parts)
        shape.attention_scale *= 2
        return shape

    monkeypatch.setattr(NativeDecoder, "_shape", spoiled)
    assert _checked("llama", "auto", "float32", tmp_path).name == "torch"
    assert "gives other logits than the model" in caplog.text
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is portable, but portable gives"):
        _checked("llama", "portable", "float32", tmp_path)
