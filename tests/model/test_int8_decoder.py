"""The native decoder over int8 layers computes what the reference in plain torch does, on every set
of kernels that is available here; a model that rounding breaks does not serve."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixd.server.engine.step import Chunk
from prefixd.server.model import decoders, int8_decoder
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.batch import lay_out
from prefixd.server.model.calibration import find_peaks
from prefixd.server.model.cpu.build import find_compiler
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.cpu.library import LibraryUnavailable, processor_flags
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoders import DecoderUnavailable
from prefixd.server.model.int8 import Int8Parts, Peaks
from prefixd.server.model.int8_decoder import describe_int8, make_int8_decoder, require_native
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.native import NativeDecoder
from prefixd.server.model.plain_texts import run_texts
from prefixd.server.model.quality import Predictions, Quality, predict, require_acceptable
from tests.model.cpu.native_library import native_library
from tests.model.int8_reference import Reference
from tests.model.test_decoders import EXACT, POOL, base_of, check_nan_stays
from tests.model.test_int8 import TEXTS, biased_base

FAMILIES = [*EXACT, "biased"]
DTYPES = ["float32", "bfloat16"]
ROUNDS_OPERANDS = {"avx512_bf16", "amx"}
"""Sets whose inputs of products, and weights of attention, are rounded to bfloat16."""

native = pytest.mark.slow  # compiles the library where it is not installed


def load(family: str, dtype: str) -> LoadedBase:
    return biased_base(dtype) if family == "biased" else base_of(family, dtype)


@cache
def peaks_of(family: str, dtype: str) -> Sequence[Peaks]:
    return find_peaks(load(family, dtype), TEXTS, block_size=16)


def decoder_of(family: str, dtype: str, kernels: str, *, threads: int = 1) -> NativeDecoder:
    library = native_library()
    if (state := library.states()[kernels]) != "available":
        pytest.skip(f"{kernels}: {state}")
    parts = Int8Parts(load(family, dtype), peaks_of(family, dtype))
    return NativeDecoder(parts, library, kernels=kernels, threads=threads, **POOL)


@cache
def reference_of(family: str, dtype: str, operand: torch.dtype) -> Reference:
    return Reference(Int8Parts(load(family, dtype), peaks_of(family, dtype)), operand=operand)


def expected_of(family: str, dtype: str, kernels: str) -> Reference:
    half = dtype == "bfloat16" and kernels in ROUNDS_OPERANDS
    return reference_of(family, dtype, torch.bfloat16 if half else torch.float32)


def differences(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference at each position, as a multiple of the logits' standard deviation."""
    return (logits - expected).abs().amax(-1) / expected.std(-1)


@torch.inference_mode()
def logits_of(decoder: Decoder, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    for index, _, logits in run_texts(decoder, texts):
        parts[index].append(logits)
    return [torch.cat(each) for each in parts]


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_alone_has_the_logits_of_the_reference(
    family: str, kernels: str, dtype: str
) -> None:
    """Attention over one position rounds nothing, so that all is exact but norms and activations.
    A code may differ where their last bit decides, in few of the rows."""
    decoder = decoder_of(family, dtype, kernels, threads=2)
    texts = [[token] for token in range(3, 63)]
    reference = expected_of(family, dtype, kernels)
    found = torch.cat(logits_of(decoder, texts))
    errors = differences(found, torch.cat([reference.logits(text) for text in texts]))
    assert float(errors.quantile(0.9)) <= 1e-4
    assert float(errors.quantile(0.95)) <= 0.1


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_have_the_logits_of_the_reference(family: str, kernels: str, dtype: str) -> None:
    """Two texts in passes of several chunks. One code that differs changes all later positions of
    a text by about a hundredth; another row, scale or position changes them by about one."""
    decoder = decoder_of(family, dtype, kernels)
    reference = expected_of(family, dtype, kernels)
    found = logits_of(decoder, TEXTS)
    errors = torch.cat(
        [differences(each, reference.logits(text)) for each, text in zip(found, TEXTS, strict=True)]
    )
    assert float(errors.median()) <= 0.1
    assert float(errors.quantile(0.9)) <= 0.2
    if dtype == "float32" or kernels not in ROUNDS_OPERANDS:
        assert float(errors.quantile(0.2)) <= 1e-4


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_a_row_has_equal_bits_alone_and_in_a_batch(family: str, kernels: str, dtype: str) -> None:
    """No scale comes from other rows, however large they are."""
    alone, shared = (decoder_of(family, dtype, kernels, threads=n) for n in (1, 2))
    expected = [logits_of(alone, [text])[0] for text in TEXTS]
    others = [[7] * 3, list(range(80, 121)), [9]]
    together = logits_of(shared, [others[0], TEXTS[0], others[1], TEXTS[1], others[2]])
    assert torch.equal(together[1], expected[0])
    assert torch.equal(together[3], expected[1])


@native
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_nan_stays_in_its_own_sequence(family: str, kernels: str) -> None:
    check_nan_stays(decoder_of(family, "float32", kernels))


@native
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_large_input_in_the_pass_changes_no_other_row(kernels: str) -> None:
    """A soft prompt may have entries far larger than those of the base."""
    decoder = decoder_of("llama", "float32", kernels)
    width = decoder.base.shape.embedding_width
    sequence = Chunk(0, tuple(TEXTS[1]), 0, [1, 2])
    with torch.inference_mode():
        decoder.zero([1, 2, 3])
        batch = lay_out([sequence], outputs=list(range(len(TEXTS[1]))))
        alone = decoder.forward(batch).values.clone()
        decoder.zero([1, 2, 3])
        both = lay_out([Chunk(1, (3,), 0, [3]), sequence], outputs=list(range(1 + len(TEXTS[1]))))
        both.inputs = [(0, torch.full((1, width), 1e6))]
        together = decoder.forward(both).values
    assert torch.equal(together[1:], alone)


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library()
    monkeypatch.setattr(decoders, "find_or_compile_library", lambda _folder: library)


@native
@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_exact_family_serves_with_its_quality_logged(
    family: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load(family, dtype)
    with caplog.at_level(logging.INFO, logger=int8_decoder.__name__):
        decoder, quality = make_int8_decoder(base, "auto", **POOL, data_folder=tmp_path)
    assert decoder.name in KERNELS
    assert 0.95 < quality.ratio < 1.05
    assert 0.9 <= quality.agreement <= 1
    assert [record.message for record in caplog.records] == [f"int8: {quality}"]
    assert sum(weight.numel() for weight in base.module.parameters()) == 0, "held twice"


@native
@pytest.mark.usefixtures("_library")
def test_a_model_that_rounding_breaks_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_layers = Int8Parts.take_layers

    def spoiled(self: Int8Parts) -> Any:
        for layer in take_layers(self):
            assert layer.v.scales is not None
            yield replace(layer, v=replace(layer.v, scales=3 * layer.v.scales))

    monkeypatch.setattr(Int8Parts, "take_layers", spoiled)
    with pytest.raises(
        UnsupportedModel,
        match=r"llama in int8 has the perplexity [\d.]+ on ordinary text, [\d.]+ times the "
        r"unrounded model's [\d.]+; the same likeliest token at \d+\.\d% of positions; expected at "
        r"most 1\.25 times and at least 80%",
    ):
        make_int8_decoder(base_of(), "auto", **POOL, data_folder=tmp_path)


@native
@pytest.mark.usefixtures("_library")
def test_a_failure_of_the_library_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeDecoder, "_take_weights", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):  # noqa: PT011  # not mistaken for a model that does not fit
        make_int8_decoder(base_of(), "auto", **POOL, data_folder=tmp_path)


@pytest.mark.parametrize("choice", ["module", "torch"])
def test_int8_needs_native_kernels(choice: str, tmp_path: Path) -> None:
    with pytest.raises(
        DecoderUnavailable,
        match=f"quantize is int8 and cpu_kernels is {choice}; expected auto or one of portable, ",
    ):
        make_int8_decoder(base_of(), choice, **POOL, data_folder=tmp_path)


def test_int8_needs_a_cpu() -> None:
    with pytest.raises(DecoderUnavailable, match="quantize is int8 and the device cuda"):
        require_native("auto", torch.device("cuda"))


def test_int8_needs_an_exact_family_a_dtype_and_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_folder: Path) -> None:
        raise LibraryUnavailable("none in this test")

    monkeypatch.setattr(decoders, "find_or_compile_library", fail)
    alone = "quantize is int8, which native kernels alone compute, but "
    for base, reason in (
        (base_of("gpt2"), "gpt2 is of the family gpt2"),
        (base_of(dtype="float16"), "the dtype is torch.float16"),
        (base_of(), "none in this test"),
    ):
        with pytest.raises(DecoderUnavailable, match=alone + reason):
            make_int8_decoder(base, "auto", **POOL, data_folder=tmp_path)


def test_predictions_do_not_depend_on_the_pool() -> None:
    """In a small one, texts run one by one."""
    base = base_of()
    large, small = (ModuleDecoder(base, num_blocks=n, block_size=16) for n in (20, 5))
    together, by_one = predict(large, TEXTS, num_blocks=20), predict(small, TEXTS, num_blocks=5)
    assert len(together.best) == sum(len(text) - 1 for text in TEXTS)
    torch.testing.assert_close(together.log_probs.float(), by_one.log_probs.float())
    assert torch.equal(together.best, by_one.best)


def test_predictions_are_those_of_the_module() -> None:
    base, text = base_of(), TEXTS[0]
    found = predict(ModuleDecoder(base, num_blocks=20, block_size=16), [text])
    base.module.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = base.module(torch.tensor([text])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]))
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert torch.equal(found.best, logits.argmax(-1))


@pytest.mark.parametrize(
    ("log_prob", "equal", "acceptable"),
    [(-2.0, 20, True), (-2.2, 16, True), (-2.3, 20, False), (-2.0, 15, False)],
)
def test_quality_has_bounds(log_prob: float, equal: int, acceptable: bool) -> None:
    best = torch.arange(20)
    unrounded = Predictions(torch.full((20,), -2.0).double(), best)
    other = torch.where(best < equal, best, 99)
    quality = Quality.of(Predictions(torch.full((20,), log_prob).double(), other), unrounded)
    assert quality.agreement == equal / 20
    assert quality.ratio == pytest.approx(float(torch.tensor(-2.0 - log_prob).exp()))
    if acceptable:
        require_acceptable(quality, "m")
    else:
        with pytest.raises(
            UnsupportedModel, match=r"expected at most 1\.25 times and at least 80%"
        ):
            require_acceptable(quality, "m")


def test_nan_is_not_acceptable() -> None:
    nan = Predictions(torch.full((4,), torch.nan), torch.zeros(4))
    with pytest.raises(UnsupportedModel, match="perplexity nan"):
        require_acceptable(Quality.of(nan, nan), "m")


@pytest.mark.parametrize(
    ("choice", "dtype", "flags", "text"),
    [
        ("auto", torch.bfloat16, {"avx512_vnni"}, "amx, by AMX-INT8"),
        ("auto", torch.float32, {"avx512_vnni"}, "avx512, by AVX512-VNNI"),
        ("auto", torch.float32, set(), "avx512, by products of 16-bit pairs"),
        ("avx512_bf16", torch.bfloat16, set(), "avx512_bf16, by AVX512-VNNI"),
        ("avx2", torch.bfloat16, {"avx512_vnni"}, "avx2, by products of 16-bit pairs"),
    ],
)
def test_the_kernels_of_int8_and_their_products_are_described(
    choice: str, dtype: torch.dtype, flags: set[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(kernels=KERNELS)
    monkeypatch.setattr(int8_decoder, "find_library", lambda _folder: library)
    monkeypatch.setattr(int8_decoder, "processor_flags", lambda: flags)
    assert describe_int8(choice, dtype, torch.device("cpu"), Path("data")) == text


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_missing_library_is_described_by_what_the_next_start_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_folder: Path) -> None:
        raise LibraryUnavailable("none in this test")

    def describe() -> str:
        return describe_int8("auto", torch.float32, torch.device("cpu"), tmp_path)

    monkeypatch.setattr(int8_decoder, "find_library", fail)
    assert (
        describe() == f"the next start compiles the native library with {find_compiler().version}"
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        DecoderUnavailable, match="alone compute, but none in this test; CXX names 'no-such-c"
    ):
        describe()


def test_the_flags_of_the_processor_are_read() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    listed = [line for line in lines if line.startswith("flags")]
    assert bool(processor_flags()) == bool(listed)
    assert all(flag in listed[0].split() for flag in processor_flags())
