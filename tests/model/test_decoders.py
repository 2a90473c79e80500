"""Which decoder serves a model, and what happens when the one that was chosen is wrong."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import Chunk, Step
from prefixd.server.model import decoders
from prefixd.server.model.cpu.library import LibraryUnavailable
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoders import DecoderUnavailable, choose_decoder, make_decoder
from prefixd.server.model.exact import NotExact
from prefixd.server.model.lean import LeanDecoder
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.parts import Parts
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import Checked, self_check
from tests.golden.families import family_model

EXACT = ["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
OTHERS = ["gemma", "glm", "gpt2", "granite", "olmo2", "phi3", "smollm3", "starcoder2"]
POOL: dict[str, Any] = {"num_blocks": 64, "block_size": 16}


def base_of(family: str = "llama", dtype: str = "float32", *, device: str = "cpu") -> LoadedBase:
    return prepare_base(family_model(family), None, name=family, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes long; the tests of native decoders have a library of their own."""

    def fail(_folder: Path) -> None:
        raise LibraryUnavailable("none in this test")

    monkeypatch.setattr(decoders, "find_or_compile_library", fail)


@pytest.mark.parametrize("family", EXACT)
def test_exact_families_run_on_lean_layers(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    assert make_decoder(base, "auto", **POOL, data_folder=tmp_path).name == "torch"
    held = {name: weight.numel() for name, weight in base.module.named_parameters()}
    assert sum(held.values()) == 0, held


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_on_the_module(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(family)
    with caplog.at_level(logging.INFO, logger=decoders.__name__):
        assert make_decoder(base, "auto", **POOL, data_folder=tmp_path).name == "module"
    [reason] = [record.message for record in caplog.records]
    assert reason == (
        f"the unmodified module serves: {family} is of the family {base.module.config.model_type}; "
        "expected one of llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe"
    )
    with pytest.raises(DecoderUnavailable, match=r"cpu_kernels is torch, but .* of the family"):
        make_decoder(base, "torch", **POOL, data_folder=tmp_path)


class _OtherLinear(torch.nn.Linear):
    """What an adapter or a quantised layer looks like."""


def _replace_linear(module: Any) -> None:
    module.model.layers[1].mlp.up_proj.__class__ = _OtherLinear


def _replace_norm(module: Any) -> None:
    module.model.layers[0].input_layernorm = torch.nn.RMSNorm(64)


def _replace_activation(module: Any) -> None:
    module.model.layers[0].mlp.act_fn = torch.nn.GELU()


def _name_activation(module: Any) -> None:
    module.config.hidden_act = "gelu"


def _add_weight(module: Any) -> None:
    module.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.ones(4)))


def _add_buffer(module: Any) -> None:
    module.model.layers[0].register_buffer("layer_scale", torch.ones(1))


def _hook(module: Any) -> None:
    module.model.layers[0].register_forward_hook(lambda *_: None)


def _pre_hook(module: Any) -> None:
    module.lm_head.register_forward_pre_hook(lambda *_: None)


def _change_forward(module: Any) -> None:
    module.model.norm.forward = lambda hidden: hidden


def _change_epsilon(module: Any) -> None:
    module.model.layers[1].post_attention_layernorm.variance_epsilon = 0.5


def _change_scale(module: Any) -> None:
    module.model.layers[1].self_attn.scaling = 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replace_linear, "_OtherLinear at model.layers.1.mlp.up_proj"),
        (_replace_norm, "RMSNorm at model.layers.0.input_layernorm"),
        (_replace_activation, "GELU at model.layers.0.mlp.act_fn"),
        (_name_activation, "the activation gelu; expected silu"),
        (_add_weight, "do not read: model.layers.0.self_attn.sinks"),
        (_add_buffer, "do not read: model.layers.0.layer_scale"),
        (_hook, "a hook at model.layers.0"),
        (_pre_hook, "a hook at lm_head"),
        (_change_forward, "a changed forward at model.norm"),
        (_change_epsilon, "epsilons of norms"),
        (_change_scale, "the scales"),
    ],
)
def test_a_model_with_an_unknown_part_is_not_exact(
    change: Callable[[Any], None], reason: str
) -> None:
    base = base_of()
    Parts(base)
    change(base.module)
    with pytest.raises(NotExact, match=reason):
        Parts(base)


def _checked(base: LoadedBase) -> Checked:
    return self_check(base, block_size=16, prefill_chunk=16)


def _choose(choice: str, folder: Path, *, dtype: str = "float32") -> Decoder:
    base = base_of(dtype=dtype)
    checked = _checked(base)
    return choose_decoder(
        lambda: base_of(dtype=dtype),
        base,
        choice,
        evidence=checked.evidence,
        **POOL,
        data_folder=folder,
    )


def _spoil_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = LeanDecoder._attend

    def spoiled(self: LeanDecoder, *args: Any) -> torch.Tensor:
        out: torch.Tensor = attend(self, *args) * 1.1
        return out

    monkeypatch.setattr(LeanDecoder, "_attend", spoiled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_that_is_right_serves(dtype: str, tmp_path: Path) -> None:
    assert _choose("torch", tmp_path, dtype=dtype).name == "torch"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_decoder_does_not_serve(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _spoil_scale(monkeypatch)
    decoder = _choose("auto", tmp_path, dtype=dtype)
    assert decoder.name == "module"
    Runner(decoder).run(_step())  # its weights are there
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "a slower decoder serves: torch gives other logits than the model: they differ by up to "
    )
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is torch, but torch gives other"):
        _choose("torch", tmp_path, dtype=dtype)


def test_a_named_native_decoder_without_a_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is avx2, but none in this test"):
        make_decoder(base_of(), "avx2", **POOL, data_folder=tmp_path)


@pytest.mark.parametrize(
    ("dtype", "block_size", "reason"),
    [
        ("float16", 16, "the dtype is torch.float16; expected float32 or bfloat16"),
        ("float32", 8, "blocks have 8 positions; expected a multiple of 16"),
    ],
)
def test_what_native_kernels_lack_runs_on_lean_layers(
    dtype: str, block_size: int, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=decoders.__name__):
        decoder = make_decoder(
            base_of(dtype=dtype), "auto", num_blocks=8, block_size=block_size, data_folder=tmp_path
        )
    assert decoder.name == "torch"
    assert [record.message for record in caplog.records] == [
        f"lean layers in torch serve, no native kernels: {reason}"
    ]


def _step() -> Step:
    sampling = SamplingParams(temperature=0)
    return Step(
        chunks=[
            Chunk(0, [4, 5, 6], 0, [1], sampling=sampling),
            Chunk(1, [7, 8], 0, [2], sampling=sampling),
        ],
        fresh=[1, 2],
    )


def test_lean_layers_keep_nan_in_its_own_sequence(tmp_path: Path) -> None:
    check_nan_stays(make_decoder(base_of(), "torch", **POOL, data_folder=tmp_path))


@torch.inference_mode()
def check_nan_stays(decoder: Decoder) -> None:
    """One sequence attends over NaN; the other one gets the logits that it gets alone."""
    shape = decoder.base.shape  # type: ignore[attr-defined]
    alone = Runner(decoder).run(_step()).sampled[1]
    width = shape.num_kv_heads * shape.head_dim
    decoder.zero([1, 2])
    decoder.write_kv([1], 0, torch.full((2 * shape.num_layers, 2, width), torch.nan))
    sampling = SamplingParams(temperature=0)
    spoiled = Chunk(0, [6], 2, [1], sampling=sampling)
    clean = Chunk(1, [7, 8], 0, [2], sampling=sampling)
    for chunks in ([spoiled, clean], [clean, spoiled]):
        decoder.zero([2])
        sampled = Runner(decoder).run(Step(chunks=chunks)).sampled
        assert not sampled[0][0].finite
        assert sampled[1] == alone


def test_an_allocation_that_fails_in_a_native_pass_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(base_of(), "torch", **POOL, data_folder=tmp_path)

    def fail(*_: object) -> None:
        raise MemoryError("pfx_run: out of memory")

    monkeypatch.setattr(decoder, "forward", fail)
    with pytest.raises(OutOfMemory, match="pfx_run: out of memory"):
        Runner(decoder).run(_step())
