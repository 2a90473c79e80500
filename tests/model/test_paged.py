"""The decoder of a GPU, on a CPU by the references of its kernels, and what takes its place."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk
from prefixd.server.model import decoders
from prefixd.server.model.batch import lay_out
from prefixd.server.model.buffers import NO_STEP
from prefixd.server.model.decoder_check import DecoderRefused
from prefixd.server.model.decoders import choose_decoder, make_decoder
from prefixd.server.model.exact import NotExact
from prefixd.server.model.paged import require_kernels
from prefixd.server.model.paged_mlp import require_grouped_products
from prefixd.server.model.selfcheck import self_check
from tests.model.fake_graph import DEVICE
from tests.model.test_decoders import POOL, base_of, check_nan_stays

EXPERTS = {"qwen3_moe", "mixtral", "qwen2_moe"}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "paged"),
        ("mistral", "paged"),
        ("qwen2", "paged"),
        ("qwen3", "paged"),
        ("qwen3_moe", "paged"),
        ("mixtral", "paged"),
        ("qwen2_moe", "paged"),
        ("gpt2", "paged_module"),
    ],
)
def test_a_decoder_on_the_kernels_gives_the_logits_of_the_model(
    family: str, kind: str, tmp_path: Path
) -> None:
    # A GPU multiplies the inputs of experts in bfloat16 alone.
    dtype = "bfloat16" if DEVICE != "cpu" and family in EXPERTS else "float32"
    base = base_of(family, dtype, device=DEVICE)
    evidence = self_check(base, block_size=16, prefill_chunk=16).evidence
    decoder = choose_decoder(
        lambda: base, base, "paged", evidence=evidence, **POOL, data_folder=tmp_path
    )
    assert decoder.name == kind


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_it_serves_in_half_precision(family: str, tmp_path: Path) -> None:
    base = base_of(family, "bfloat16", device=DEVICE)
    evidence = self_check(base, block_size=16, prefill_chunk=16).evidence
    choose_decoder(lambda: base, base, "paged", evidence=evidence, **POOL, data_folder=tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("kind", decoders.PAGED)
def test_nan_stays_in_its_own_sequence(kind: str, family: str, tmp_path: Path) -> None:
    base = base_of(family, device=DEVICE)
    check_nan_stays(make_decoder(base, kind, **POOL, data_folder=tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_a_step_without_outputs_writes_its_kv(family: str, tmp_path: Path) -> None:
    """A part of a prompt, or a prefix that is compiled."""
    dtype = "bfloat16" if DEVICE != "cpu" else "float32"
    decoder = make_decoder(
        base_of(family, dtype, device=DEVICE), "paged", **POOL, data_folder=tmp_path
    )
    chunk = Chunk(0, [11, 12, 13], 0, (1,), sampling=SamplingParams(temperature=0))
    whole = decoder.forward(lay_out([chunk])).values
    kv = decoder.read_kv((1,), 3)
    part = decoder.forward(lay_out([replace(chunk, sampling=None, block_table=(2,))])).values
    assert (len(whole), len(part)) == (1, 0)
    assert torch.equal(decoder.read_kv((2,), 3), kv)


def test_the_null_block_stays_zero(tmp_path: Path) -> None:
    base = base_of(device=DEVICE)
    decoder: Any = make_decoder(base, "paged", **POOL, data_folder=tmp_path)
    check_nan_stays(decoder)
    assert not decoder.cache.pool[:, :, 0].any()
    assert decoder.cache.pool[:, :, 1].any()


def test_the_log_names_what_the_kernels_do_not_compute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("qwen3_moe")
    with caplog.at_level(logging.INFO, logger=decoders.__name__):
        with monkeypatch.context() as patch:
            patch.delattr(torch.nn.functional, "grouped_mm")
            decoder = make_decoder(base, "paged", **POOL, data_folder=tmp_path)
        assert decoder.name == "paged_module"
        odd = replace(base, shape=replace(base.shape, head_dim=24))
        with pytest.raises(NotExact, match="heads of size 24; expected a multiple of 16"):
            require_kernels(odd)
        assert make_decoder(odd, "paged", **POOL, data_folder=tmp_path).name == "module"
    in_float32 = replace(base, device=torch.device("cuda"))
    with pytest.raises(NotExact, match=r"experts in torch.float32; expected bfloat16 on a GPU"):
        require_grouped_products(in_float32)
    messages = [record.message for record in caplog.records]
    assert messages[0] == (
        "the layers of the unmodified module serve: qwen3_moe has experts, for which torch "
        f"{torch.__version__} has no grouped_mm"
    )
    assert messages[-1].startswith("the unmodified module serves: qwen3_moe has heads of size 24")


class CompilationError(Exception):
    """As Triton's: of no class that torch knows."""


def test_on_a_gpu_a_slower_decoder_takes_the_place_of_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    def make(_base: object, choice: str, **_: object) -> Any:
        made.append(choice)
        if choice == "paged":
            raise CompilationError("out of shared memory")
        return SimpleNamespace(name=choice, device=torch.device("cuda"))

    def check(decoder: Any, *_: object, **__: object) -> None:
        raise DecoderRefused(decoder.name, "they differ")

    monkeypatch.setattr(decoders, "make_decoder", make)
    monkeypatch.setattr(decoders, "check_decoder", check)
    base: Any = SimpleNamespace(device=torch.device("cuda"))
    evidence: Any = None
    decoder = choose_decoder(
        lambda: base, base, "auto", evidence=evidence, **POOL, data_folder=tmp_path, sizes=NO_STEP
    )
    assert decoder.name == "module"
    assert made == ["paged", "paged_module", "module"]
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "a slower decoder serves: out of shared memory",
        "a slower decoder serves: paged_module gives other logits than the model: they differ",
    ]
