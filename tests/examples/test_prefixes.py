"""The committed example prefixes: well-formed, small, and as good as their README claims."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HIDDEN, LAYERS, KV_HEADS, HEAD_DIM = 576, 30, 3, 64  # of SmolLM2-135M

SOFT = {"PROMPT_TUNING", "P_TUNING"}
LISTED = json.loads((EXAMPLES / "prefixes.json").read_text("utf-8"))["prefixes"]
TRAINED = [entry for entry in LISTED if entry["peft_type"]]
TEXTS = [entry for entry in LISTED if not entry["peft_type"]]


def by_name(entries):
    return pytest.mark.parametrize("entry", entries, ids=[entry["name"] for entry in entries])


def read_tensors(path):
    """Read a safetensors file by hand: {name: (dtype, shape, float32 values)}."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        data = body[slice(*info["data_offsets"])]
        match info["dtype"]:
            case "F32":
                values = np.frombuffer(data, "<f4")
            case "F16":
                values = np.frombuffer(data, "<f2").astype(np.float32)
            case "BF16":
                values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        tensors[name] = info["dtype"], info["shape"], values
    return tensors


def test_every_kind_and_dtype_is_shown():
    assert {entry["peft_type"] for entry in LISTED} == {
        *SOFT, "PREFIX_TUNING", "CARTRIDGE", None,
    }  # fmt: skip
    assert {entry["kind"] for entry in LISTED} == {"soft_prompt", "kv_prefix", "hard_prompt"}
    assert len({entry["name"] for entry in LISTED}) == len(LISTED) >= 8


@by_name(LISTED)
def test_a_listed_prefix_can_be_demonstrated(entry):
    assert set(entry) == {
        "name", "kind", "peft_type", "path", "summary", "max_tokens", "prompts",
    }  # fmt: skip
    assert entry["max_tokens"] > 0
    assert len(entry["prompts"]) >= 2
    for messages in entry["prompts"]:
        assert [message["role"] for message in messages] == ["user"]


@by_name(TRAINED)
def test_a_trained_prefix_fits_the_demo_model(entry):
    folder = EXAMPLES / entry["path"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == entry["peft_type"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == MODEL_ID
    assert config.get("tokenizer_name_or_path") in (None, MODEL_ID)

    soft = entry["peft_type"] in SOFT
    assert entry["kind"] == ("soft_prompt" if soft else "kv_prefix")
    width = HIDDEN if soft else LAYERS * 2 * KV_HEADS * HEAD_DIM
    tensors = read_tensors(folder / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    _, shape, values = tensors["prompt_embeddings"]
    assert shape == [config["num_virtual_tokens"], width]
    assert np.isfinite(values).all()
    assert 0 < np.abs(values).max() < 1000  # the base's own keys stay below about 100


@by_name(TEXTS)
def test_a_text_prefix_is_there_and_names_no_peft_type(entry):
    assert entry["kind"] == "hard_prompt"
    text = (EXAMPLES / entry["path"] / "prefix.txt").read_text("utf-8")
    assert text.endswith("<|im_end|>\n")  # so that the templated chat begins on a new line


def test_the_examples_stay_small():
    weights = [path.stat().st_size for path in EXAMPLES.rglob("*.safetensors")]
    assert sum(weights) < 2_000_000
    everything = [path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()]
    assert sum(everything) - sum(weights) < 500_000


def test_nothing_names_a_machine():
    for path in EXAMPLES.rglob("*.json*"):
        text = path.read_text("utf-8")
        for folder in ("/home/", "/root/", "/work/", "/tmp/", "/Users/"):
            assert folder not in text, path


def prompts(file_name):
    lines = (EXAMPLES / "data" / file_name).read_text("utf-8").splitlines()
    return {json.loads(line)["prompt"].lower() for line in lines}


@by_name(LISTED)
def test_held_out_rows_were_never_shown(entry):
    name = entry["name"]
    held_out = prompts(
        "questions.test.jsonl" if name in {"alice", "bob", "carol"} else f"{name}.test.jsonl"
    )
    if entry["peft_type"]:
        assert not held_out & prompts(f"{name}.train.jsonl")
    else:
        shown = (EXAMPLES / entry["path"] / "prefix.txt").read_text("utf-8").lower()
        assert not [prompt for prompt in held_out if prompt in shown]
