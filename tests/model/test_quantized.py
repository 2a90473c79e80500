"""Quantized checkpoints are run as what they are, or refused in one sentence."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from prefixd.server.model import quantized
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.checkpoint import read_config
from prefixd.server.model.decoders import CHOICES, DecoderUnavailable, make_decoder
from prefixd.server.model.fingerprint import fingerprint_of
from prefixd.server.model.float32 import float32_arithmetic
from prefixd.server.model.heads import refuse_indivisible
from prefixd.server.model.load import LoadedBase, _cast, check_folder, load_base
from prefixd.server.model.quantized import computes_exactly, refuse_unloadable, scheme_of
from prefixd.server.model.selfcheck import self_check
from tests.model.quantized_folders import SCHEMES, float8_folder, plain_folder, torchao_folder
from tests.model.tiny_folder import edit_json

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    plain = plain_folder(root / "plain")
    made = {name: torchao_folder(plain, root / name, name) for name in SCHEMES}
    return {"plain": plain, **made, "fp8": float8_folder(plain, root / "fp8")}


def load(folder: Path, dtype: str = "float32") -> LoadedBase:
    return load_base(str(folder), dtype=dtype, device="cpu", cache_dir=folder)


@pytest.mark.parametrize(
    "case",
    [
        ("weights", "float32", True),
        ("weights", "bfloat16", True),
        ("rows", "float32", False),
        ("rows", "bfloat16", False),
        ("float8", "float32", True),
    ],
)
def test_a_torchao_checkpoint_passes_the_check_and_is_run_by_its_module(
    case: tuple[str, str, bool],
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, dtype, exact = case
    base = load(folders[name], dtype)
    assert base.scheme == f"torchao {type(SCHEMES[name]).__name__}"
    assert base.computes_exactly is exact
    evidence = self_check(base, block_size=16).evidence
    assert (evidence.median == 1e-4) == (exact and dtype == "float32")
    pool: dict[str, Any] = {"num_blocks": 4, "block_size": 16, "data_folder": tmp_path}
    with caplog.at_level(logging.INFO):
        assert make_decoder(base, "auto", **pool).name == "module"
    reason = f"{name} has quantized weights at model.layers.0.self_attn.q_proj"
    assert reason in caplog.text
    for choice in set(CHOICES) - {"auto", "module"}:
        with pytest.raises(DecoderUnavailable, match=reason):
            make_decoder(base, choice, **pool)
    assert make_decoder(base, "paged", **pool).name in {"module", "paged_module"}


def test_plain_tensors_alone_take_the_serving_dtype(folders: dict[str, Path]) -> None:
    module = load(folders["weights"], "bfloat16").module
    weight = module.model.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.int8
    assert weight.scale.dtype == torch.float32
    assert module.model.norm.weight.dtype == torch.bfloat16
    module.set_attn_implementation("eager")
    assert module(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_the_fingerprint_is_that_of_the_stored_weights(folders: dict[str, Path]) -> None:
    names = ("plain", "weights", "rows", "float8")
    prints = {name: load(folders[name]).fingerprint for name in names}
    assert len(set(prints.values())) == len(names)
    assert load(folders["weights"], "bfloat16").fingerprint == prints["weights"]
    base = load(folders["weights"])
    base.module.model.layers[1].mlp.up_proj.weight.qdata[3, 5] += 1
    assert fingerprint_of(base.module, base.tokenizer) != prints["weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_that_are_rounded_by_the_whole_batch_are_refused(
    dtype: str, folders: dict[str, Path]
) -> None:
    refused = r"model.layers.0.self_attn.q_proj, that rounds its inputs by all rows of a batch"
    with pytest.raises(UnsupportedModel, match=refused):
        load(folders["batch"], dtype)


def test_a_dtype_that_the_layers_do_not_run_in_is_refused_with_one_that_they_do(
    folders: dict[str, Path],
) -> None:
    with pytest.raises(UnsupportedModel, match=r"on cpu in bfloat16 \(.*\); expected float32$"):
        load(folders["float8"], "bfloat16")


def test_weights_that_transformers_restores_are_plain(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        base = load(folders["fp8"])
    assert "fp8: transformers restored plain weights from fp8" in caplog.text
    assert base.scheme == "fp8"
    self_check(base, block_size=16)
    expected = load(folders["plain"]).module.model.layers[1].mlp.up_proj.weight
    difference = base.module.model.layers[1].mlp.up_proj.weight - expected
    assert 0 < difference.norm() / expected.norm() < 0.05
    pool: dict[str, Any] = {"num_blocks": 4, "block_size": 16, "data_folder": tmp_path}
    assert make_decoder(base, "torch", **pool).name == "torch"


class Packed(nn.Module):
    """A layer as GPTQ and bitsandbytes have: packed integers, and scales that belong to them."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.register_buffer("qweight", torch.ones(4, 1, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(4, dtype=torch.float16))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        scales: Any = self.scales
        assert scales.dtype == torch.float16
        return (rows.half() * scales).to(rows.dtype)


def test_scales_of_packed_weights_are_never_cast() -> None:
    model = nn.ModuleDict({"packed": Packed(), "norm": nn.LayerNorm(4, dtype=torch.float16)})
    _cast(model, torch.bfloat16)
    assert model["packed"].scales.dtype == torch.float16
    assert model["norm"].weight.dtype == torch.bfloat16
    with float32_arithmetic(model, scratch_bytes=0):
        assert model["packed"].scales.dtype == torch.float16
        assert model["norm"].weight.dtype == torch.float32
    assert model["norm"].weight.dtype == torch.bfloat16


def test_layers_that_compute_in_half_precision_are_not_exact(folders: dict[str, Path]) -> None:
    module = load(folders["plain"]).module
    where: dict[str, Any] = {"name": "m", "device": CPU, "dtype": torch.float32}
    assert computes_exactly(module, **where)
    module.model.layers[0].mlp.up_proj = Packed()
    assert not computes_exactly(module, **where)


METHODS = ("bitsandbytes", "gptq", "awq", "fp8", "torchao", "compressed-tensors", "quanto")


def config_of(method: str, folders: dict[str, Path], tmp_path: Path, **fields: Any) -> Any:
    folder = shutil.copytree(folders["plain"], tmp_path / "base")
    edit_json(folder / "config.json", quantization_config={"quant_method": method, **fields})
    return read_config(str(folder))


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_package_is_named_with_the_method(
    method: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(method, folders, tmp_path)
    refuse_unloadable("base", folders["plain"] and transformers.LlamaConfig(), CPU)
    monkeypatch.setattr(quantized, "_is_installed", lambda package: package == "accelerate")
    needed = [name for name in quantized._METHODS[method].packages if name != "accelerate"]
    if not needed:
        refuse_unloadable("base", config, CPU)
        needed = ["accelerate"]
        monkeypatch.setattr(quantized, "_is_installed", lambda _package: False)
    with pytest.raises(UnsupportedModel) as refused:
        refuse_unloadable("base", config, CPU)
    assert f"base is quantized with {method}, which transformers reads with" in str(refused.value)
    assert f"not installed here: {' and '.join(needed)}" in str(refused.value)
    assert ("the extra prefixd[torchao]" in str(refused.value)) == (method == "torchao")
    monkeypatch.setattr(quantized, "_is_installed", lambda _package: True)
    refuse_unloadable("base", config, CPU)


def test_a_method_for_gpus_names_the_device_that_it_needs(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_is_installed", lambda _package: True)
    config = config_of("eetq", folders, tmp_path)
    refuse_unloadable("base", config, GPU)
    assert quantized.placement(config, GPU) == {"device_map": {"": GPU}}
    assert quantized.placement(transformers.LlamaConfig(), GPU) == {}
    message = "eetq, which runs on a GPU alone; expected the device cuda, received cpu"
    with pytest.raises(UnsupportedModel, match=message):
        refuse_unloadable("base", config, CPU)


@pytest.mark.parametrize("method", ["hqq", "nvfp4", "method_of_tomorrow", ""])
def test_a_method_that_transformers_does_not_read_is_refused(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(method, folders, tmp_path)
    named = f"quantized with {method or 'an unnamed method'}, whose checkpoints transformers"
    with pytest.raises(UnsupportedModel, match=f"{named} .* does not read; expected plain"):
        refuse_unloadable("base", config, CPU)


def test_every_method_of_transformers_is_known_or_refused() -> None:
    methods = {each.value for each in transformers.utils.quantization_config.QuantizationMethod}
    only_written = {"hqq", "nvfp4", "metal", "gemma", "gguf"}
    assert methods - only_written == set(quantized._METHODS)


@pytest.mark.parametrize(
    ("fields", "scheme"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bits"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes nf4",
        ),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack"}, "compressed-tensors pack"),
        ({"quant_method": "gguf"}, None),
        (
            {"quant_method": "m" * 99, "quant_type": {"default": {"_type": "t" * 99}}},
            "m" * 60 + " " + "t" * 60,
        ),
    ],
)
def test_the_scheme_is_named_after_method_and_kind(
    fields: dict[str, Any], scheme: str | None
) -> None:
    assert scheme_of(transformers.LlamaConfig(quantization_config=fields)) == scheme


def test_quantized_weights_are_neither_divided_nor_rounded_again(
    folders: dict[str, Path],
) -> None:
    config = read_config(str(folders["weights"]))
    with pytest.raises(UnsupportedModel, match="tensor_parallel is 2: only plain weights"):
        refuse_indivisible(config, ranks=2)
    check: dict[str, Any] = {"pool_tokens": 64, "device": "cpu"}
    with pytest.raises(UnsupportedModel, match="quantize is int8, which rounds plain weights"):
        check_folder(str(folders["weights"]), rounded=True, **check)
    assert check_folder(str(folders["weights"]), **check) == "torchao Int8WeightOnlyConfig"
    assert check_folder(str(folders["plain"]), rounded=True, **check) is None


def test_torchao_adds_no_noise_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    lines = {
        "torchao": ("Failed to load /lib/_C_mxfp8.so: not here", "Failed to load a file of yours"),
        "torch.utils._pytree": ("<enum> Calling register_constant() on Enum", "a bad tree"),
    }
    for name, (noise, real) in lines.items():
        for text in (noise, real):
            logging.getLogger(name).warning(text)
    assert [record.getMessage() for record in caplog.records] == [
        real for _, real in lines.values()
    ]
