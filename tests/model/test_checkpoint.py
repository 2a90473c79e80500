"""A model's files are loaded whole or refused in one sentence that names what is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.checkpoint import read_config, read_tokenizer, read_weights
from prefixd.server.model.load import check_folder, load_base
from tests.model.tiny_folder import SIZES, edit_json, edit_tensors, save_folder, tiny_llama

Change = Callable[[Path], object]

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as they should be."""
    root = tmp_path_factory.mktemp("saved")
    mixtral = transformers.MixtralConfig(**SIZES, num_local_experts=2, sliding_window=None)
    gpt2 = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    llama = transformers.LlamaConfig(**SIZES, pad_token_id=0)
    models = {
        "llama": tiny_llama(),
        "tied": tiny_llama(tie_word_embeddings=True),
        "mixtral": transformers.MixtralForCausalLM(mixtral),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "classifier": transformers.LlamaForSequenceClassification(llama),
        "backbone": transformers.LlamaModel(llama),
        "encoder": transformers.BertForSequenceClassification(
            transformers.BertConfig(**{**SIZES, "num_key_value_heads": None})
        ),
        "vision": transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
        ),
        "translator": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1)
        ),
    }
    folders = {name: save_folder(model, root / name) for name, model in models.items()}
    folders["sharded"] = save_folder(tiny_llama(), root / "sharded", shard_size="20KB")
    return folders


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """``copied(name, change)`` is a changed copy of a saved folder."""

    def copy(name: str, change: Change | None = None) -> Path:
        folder = shutil.copytree(saved[name], tmp_path / "base")
        if change is not None:
            change(folder)
        return folder

    return copy


def load(folder: Path) -> Any:
    return load_base(str(folder), dtype="float32", device="cpu", cache_dir=folder)


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        load(folder)
    message = str(refused.value)
    assert "\n" not in message
    for advice in ("trust_remote_code", "pip install", "weights_only", "ignore_mismatched"):
        assert advice not in message
    return message


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: edit_tensors(folder, change)


def config(**fields: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **fields)


def drop(*parts: str) -> Change:
    """Remove the tensors whose names contain all ``parts``."""
    return tensors(
        lambda held: [held.pop(name) for name in list(held) if all(p in name for p in parts)]
    )


def replace(name: str, *shape: int) -> Change:
    return tensors(lambda held: held.update({name: torch.ones(shape)}))


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def remove(pattern: str) -> Change:
    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return apply


def cut(pattern: str, length: int) -> Change:
    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            os.truncate(path, length)

    return apply


def rewrite_index(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return apply


def empty_first_shard(folder: Path) -> None:
    path = min(folder.glob("model-*.safetensors"))
    save_file({}, path, metadata={"format": "pt"})


WEIGHTS: dict[str, tuple[str, Change | None, str]] = {
    "one missing": ("llama", drop(DOWN), f"lacks weights of LlamaForCausalLM.*: {DOWN}$"),
    "a layer missing": ("llama", drop("layers.1."), r"layernorm.weight, .* and 6 more \(9 tensors"),
    "a layer too few": ("llama", config(num_hidden_layers=3), r"layers.2.* \(9 tensors\)$"),
    "a layer left over": ("llama", config(num_hidden_layers=1), "leave out: model.layers.1"),
    "no layers": ("llama", config(num_hidden_layers=0), "leave out: model.layers.0"),
    "a head missing": ("classifier", None, "saved by LlamaForSequenceClassification.*: lm_head"),
    "no head": ("backbone", None, r"saved by LlamaModel\), .* random: lm_head.weight"),
    "another head": (
        "tied",
        lambda folder: (
            replace("score.weight", 3, 16)(folder),
            config(architectures=["LlamaForSequenceClassification"])(folder),
        ),
        r"saved by LlamaForSequenceClassification\) would leave out: score.weight",
    ),
    "an unused bias": (
        "llama",
        replace("model.layers.0.self_attn.q_proj.bias", 16),
        "leave out: model.layers.0.self_attn.q_proj.bias",
    ),
    "an unused norm": (
        "llama",
        replace("model.layers.0.self_attn.q_norm.weight", 8),
        "leave out: model.layers.0.self_attn.q_norm.weight",
    ),
    "a shape": (
        "llama",
        replace("model.norm.weight", 8),
        r"other shapes: expected model.norm.weight \[16\], got \[8\]$",
    ),
    "a vocabulary": (
        "llama",
        config(vocab_size=320),
        r"lm_head.weight \[320, 16\], got \[300, 16\], model.embed_tokens.weight",
    ),
    "an expert missing": ("mixtral", drop("layers.0", "experts.1.w1"), "layers.0.mlp.experts.gate"),
    "all experts missing": ("mixtral", drop("layers.1", "experts"), "layers.1.mlp.experts.down"),
    "too few experts": ("mixtral", config(num_local_experts=4), r"expected .*\[4, .*got \[2, "),
    "an index that lies": ("sharded", empty_first_shard, "lacks weights of"),
}


FILES: dict[str, tuple[str, Change | None, str]] = {
    "empty": ("llama", remove("*"), "holds no config.json"),
    "no config": ("llama", remove("config.json"), "holds no config.json"),
    "no weights": ("llama", remove("*.safetensors"), "no file named model.safetensors"),
    "config is not JSON": ("llama", write("config.json", b"{nope"), "config.json is not JSON"),
    "config is binary": ("llama", write("config.json", b"\xff\xfe"), "config.json is not JSON"),
    "config is a list": ("llama", write("config.json", b"[1]"), "expected a model_type.*None"),
    "no type": ("llama", config(model_type=None), "expected a model_type in config.json, got None"),
    "type is a number": ("llama", config(model_type=7), "expected a model_type .* got 7"),
    "unknown type": ("llama", config(model_type="mystery"), "type mystery, which transformers 5"),
    "a size in words": ("llama", config(hidden_size="big"), "'hidden_size' expected int, got str"),
    "an odd size": ("llama", config(num_attention_heads=3), "not a multiple of the number of att"),
    "unknown activation": ("llama", config(hidden_act="nope"), "KeyError: 'nope'"),
    "truncated": ("llama", cut("model.safetensors", 900), "model.safetensors is damaged or inc"),
    "zero bytes": ("llama", cut("model.safetensors", 0), "model.safetensors is damaged or incom"),
    "a broken header": (
        "llama",
        write("model.safetensors", b"\x08\0\0\0\0\0\0\0{{{{{{{{"),
        "model.safetensors is damaged",
    ),
    "a pointer": (
        "llama",
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors is a Git LFS pointer",
    ),
    "a shard is missing": (
        "sharded",
        remove("model-00002-*"),
        r"model-00002-of-000\d\d.safetensors is missing",
    ),
    "a shard is cut": (
        "sharded",
        cut("model-00002-*", 100),
        r"model-00002-of-000\d\d.safetensors is damaged",
    ),
    "an index of nothing": (
        "sharded",
        rewrite_index(lambda index: index["weight_map"].update({DOWN: "nowhere.safetensors"})),
        "nowhere.safetensors is missing",
    ),
    "an index without a map": ("sharded", rewrite_index(lambda index: index.clear()), "weight_map"),
    "an index is not JSON": (
        "sharded",
        write("model.safetensors.index.json", b"{"),
        "index.json is not JSON",
    ),
    "no tokenizer": ("llama", remove("token*"), "holds no tokenizer.json"),
    "no tokenizer of a class": ("gpt2", remove("token*"), "holds no tokenizer"),
    "tokenizer is not JSON": ("llama", write("tokenizer.json", b"{"), "tokenizer.json is not JSON"),
    "tokenizer config is not JSON": (
        "llama",
        write("tokenizer_config.json", b"{"),
        "tokenizer_config.json is not JSON",
    ),
    "an adapter in the folder": (
        "llama",
        write("adapter_config.json", b"{}"),
        "holds a PEFT adapter",
    ),
    "an encoder": ("encoder", None, "lacks weights of BertLMHeadModel .*ForSequenceClassific"),
    "a vision model": ("vision", None, "type vit, which predicts no text"),
    "an encoder-decoder": ("translator", None, "t5 .* is an encoder-decoder"),
}


@pytest.mark.parametrize("case", [*WEIGHTS, *FILES])
def test_a_folder_that_cannot_be_served_is_refused_by_name(
    case: str, copied: Callable[..., Path]
) -> None:
    name, change, message = {**WEIGHTS, **FILES}[case]
    folder = copied(name, change)
    text = refusal(folder)
    assert text.startswith(str(folder)) or name == "translator"
    with pytest.raises(UnsupportedModel, match=message):
        raise UnsupportedModel(text)


METHODS = {  # method: the package that serves it, where it needs one
    "aqlm": "aqlm",
    "auto-round": "auto_round",
    "awq": "gptqmodel",
    "bitnet": "",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "fp8": "kernels",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "mxfp4": "kernels",
    "quanto": "optimum.quanto",
    "method_of_tomorrow": "",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused_by_method_and_package(
    field: str, method: str, copied: Callable[..., Path]
) -> None:
    text = refusal(copied("llama", config(**{field: {"quant_method": method}})))
    assert f"is quantized with {method}" in text
    assert (f"needs the package {METHODS[method]}, which" in text) == bool(METHODS[method])


def test_every_quantization_method_of_transformers_is_refused_or_plain(
    copied: Callable[..., Path],
) -> None:
    folder = copied("llama")
    for method in transformers.utils.quantization_config.QuantizationMethod:
        edit_json(folder / "config.json", quantization_config={"quant_method": method.value})
        if method.value == "gguf":  # what transformers writes with weights it read from GGUF
            assert load(folder).module.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
        else:
            assert f"quantized with {method.value}" in refusal(folder)


OWN_CODE = """\
from pathlib import Path
Path(__file__).with_name("executed").touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
"""


def own_code(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "own.py").write_text(OWN_CODE)
        edit_json(folder / "config.json", architectures=["MysteryForCausalLM"], **fields)

    return change


def own_tokenizer(folder: Path) -> None:
    own_code()(folder)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="MysteryTokenizer",
        auto_map={"AutoTokenizer": ["own.T", None]},
    )


@pytest.mark.parametrize(
    "change",
    [
        own_code(
            model_type="mystery",
            auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
        ),
        own_code(auto_map={"AutoModelForCausalLM": "own.M"}),
        own_tokenizer,
    ],
    ids=["config", "model", "tokenizer"],
)
def test_code_of_a_repository_is_neither_run_nor_asked_about(
    change: Change,
    copied: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = copied("llama", change)
    assert "needs code of its own" in refusal(folder)
    assert not (folder / "executed").exists()
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_a_tokenizer_in_python_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied("llama", remove("token*"))
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1, "b</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    transformers.CTRLTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt")
    ).save_pretrained(folder)
    assert "tokenizer CTRLTokenizer, which runs in Python only" in refusal(folder)


class Executed:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_in_a_pickle_are_loaded_and_code_in_it_is_not_run(
    copied: Callable[..., Path],
) -> None:
    folder = copied("llama")
    held = load_file(folder / "model.safetensors")
    expected = load(folder).fingerprint
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    assert load(folder).fingerprint == expected
    torch.save({**held, "more": Executed(folder / "executed")}, folder / "pytorch_model.bin")
    assert "a .bin file is damaged or holds more than tensors" in refusal(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tied", None),
        ("sharded", None),
        ("llama", replace("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
        ("gpt2", replace("transformer.h.0.attn.masked_bias", 1)),
        ("llama", config(architectures=None)),
    ],
    ids=["tied", "sharded", "rotary", "mask", "no architecture"],
)
def test_tensors_that_transformers_computes_are_ignored(
    name: str, change: Change | None, copied: Callable[..., Path]
) -> None:
    folder = copied(name, change)
    if name == "tied":
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(folder).fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("case", ["no config", "no type", "no tokenizer", "a vision model"])
def test_the_check_without_weights_refuses_the_same(case: str, copied: Callable[..., Path]) -> None:
    name, change, _ = FILES[case]
    folder = copied(name, change)
    with pytest.raises(UnsupportedModel) as refused:
        check_folder(str(folder), pool_tokens=128)
    assert str(refused.value) == refusal(folder)


def test_parts_are_read_by_transformers(saved: dict[str, Path]) -> None:
    source = str(saved["llama"])
    assert type(read_weights(source, read_config(source))) is transformers.LlamaForCausalLM
    assert len(read_tokenizer(source)) == SIZES["vocab_size"]
