"""Ways in which a model's folder can be damaged, and what its refusal says of each."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.model.tiny_folder import edit_json, edit_tensors

Change = Callable[[Path], object]

DOWN = "model.layers.1.mlp.down_proj.weight"


def all_of(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: edit_tensors(folder, change)


def config(**fields: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **fields)


def generation(**fields: Any) -> Change:
    return lambda folder: edit_json(folder / "generation_config.json", **fields)


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


def in_type(dtype: str, part: str = "") -> Change:
    """Store the tensors whose names contain ``part`` in another type."""
    return tensors(
        lambda held: held.update(
            {name: held[name].to(getattr(torch, dtype)) for name in held if part in name}
        )
    )


def as_pickle(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


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
    "an extra expert": (
        "mixtral",
        tensors(
            lambda held: held.update(
                {
                    name.replace("experts.1.", "experts.2."): tensor.clone()
                    for name, tensor in held.items()
                    if "experts.1." in name
                }
            )
        ),
        r"expected .*\[2, .*got \[3, ",
    ),
    "all in float8": ("llama", in_type("float8_e4m3fn"), "of the type F8_E4M3: lm_head.* 18 more"),
    "one in int8": ("llama", in_type("int8", DOWN), f"of the type I8: {DOWN}; expected float32"),
    "norms of integers": ("llama", in_type("int64", "norm"), "of the type I64: .*layernorm"),
    "a mask for a weight": ("llama", in_type("bool", DOWN), f"of the type BOOL: {DOWN}"),
    "integers in a pickle": (
        "llama",
        all_of(in_type("int8", DOWN), as_pickle),
        f"of the type int8: {DOWN}",
    ),
    "old GPTQ": (
        "llama",
        tensors(
            lambda held: held.update({DOWN[:-6] + "qweight": held.pop(DOWN).to(torch.int32)}),
        ),
        "of the type I32: .*qweight",
    ),
    "an index that lies": ("sharded", empty_first_shard, "lacks weights of"),
}


FILES: dict[str, tuple[str, Change | None, str]] = {
    "empty": ("llama", remove("*"), "holds no config.json"),
    "no config": ("llama", remove("config.json"), "holds no config.json"),
    "no weights": ("llama", remove("*.safetensors"), "no file named model.safetensors"),
    "config is not JSON": ("llama", write("config.json", b"{nope"), "config.json is not JSON"),
    "config is binary": ("llama", write("config.json", b"\xff\xfe"), "config.json is not JSON"),
    "config is a list": ("llama", write("config.json", b"[1]"), "expected a model_type.*None"),
    "config is null": ("llama", write("config.json", b"null"), "config.json holds no JSON object"),
    "classes are no list": (
        "llama",
        config(architectures="Llama"),
        "a list of class names .*Llama",
    ),
    "classes are numbers": ("llama", config(architectures=[3]), r"a list of class names .*\[3\]"),
    "no positions": ("llama", config(max_position_embeddings=0), "of at least 1, got 0"),
    "fewer than no positions": ("llama", config(max_position_embeddings=-1), "at least 1, got -1"),
    "quantized with a word": ("llama", config(quantization_config="awq"), "an object .*got 'awq'"),
    "quantized with a list": ("llama", config(quantization_config=[]), r"an object .*got \[\]"),
    "quantized with nothing": ("llama", config(quantization_config={}), "with an unnamed method"),
    "end of text in words": ("llama", generation(eos_token_id="end"), "as eos_token_id, got 'end'"),
    "end of text in lists": ("llama", generation(eos_token_id=[[1]]), r"_id, got \[\[1\]\]"),
    "generation config is cut": (
        "llama",
        write("generation_config.json", b"{"),
        "generation_config.json is not JSON",
    ),
    "generation config is a list": (
        "llama",
        write("generation_config.json", b"[]"),
        "generation_config.json holds no JSON object",
    ),
    "other weights": (
        "llama",
        lambda folder: (folder / "model.safetensors").rename(folder / "model-q4.gguf"),
        "no file named model.safetensors or .*; got model-q4.gguf, which prefixd does not read",
    ),
    "a folder for weights": (
        "llama",
        all_of(remove("*.safetensors"), lambda folder: (folder / "model.safetensors").mkdir()),
        "model.safetensors is not a file",
    ),
    "a broken link": (
        "llama",
        all_of(
            remove("*.safetensors"),
            lambda folder: (folder / "model.safetensors").symlink_to("nowhere"),
        ),
        "model.safetensors is a link to a file that is missing",
    ),
    "one byte short": (
        "llama",
        lambda folder: os.truncate(
            folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1
        ),
        "model.safetensors is damaged or incomplete",
    ),
    "a cut pickle": (
        "llama",
        all_of(as_pickle, cut("*.bin", 900)),
        "pytorch_model.bin is damaged",
    ),
    "an empty pickle": (
        "llama",
        all_of(as_pickle, cut("*.bin", 0)),
        "pytorch_model.bin is damaged",
    ),
    "a pickled list": (
        "llama",
        all_of(as_pickle, lambda folder: torch.save([1], folder / "pytorch_model.bin")),
        "pytorch_model.bin is damaged or holds more than tensors",
    ),
    "tokenizer without a model": (
        "llama",
        write("tokenizer.json", b'{"version": "1.0"}'),
        "tokenizer.json is not read by the tokenizers package",
    ),
    "tokenizer is a list": (
        "llama",
        write("tokenizer.json", b"[]"),
        "tokenizer.json holds no JSON",
    ),
    "a Python tokenizer named": (
        "llama",
        lambda folder: edit_json(
            folder / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer"
        ),
        "tokenizer BertJapaneseTokenizer, which runs in Python only",
    ),
    "SentencePiece alone": (
        "llama",
        all_of(remove("token*"), write("tokenizer.model", b"\n\5<unk>")),
        "holds no tokenizer.json",
    ),
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
    "an encoder-decoder": ("translator", None, "pegasus is an encoder-decoder of a family"),
}
