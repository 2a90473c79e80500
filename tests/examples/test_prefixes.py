"""The committed example prefixes are well-formed and small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.tasks import ALL, Task
from prefixd.store.artifact.artifact import inspect_peft
from prefixd.store.artifact.base_spec import BaseSpec

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO = BaseSpec(
    name=MODEL_ID,
    fingerprint="",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    embedding_width=576,
    max_virtual_tokens=64,
    dtype="float32",
    max_abs_embedding=64.0,  # the bounds of the server are larger: see model/selfcheck.py
    max_abs_kv=200.0,
)

SOFT = {"PROMPT_TUNING", "P_TUNING"}
LISTED = json.loads((EXAMPLES / "prefixes.json").read_text("utf-8"))["prefixes"]
TRAINED = [entry for entry in LISTED if entry["peft_type"]]
TEXTS = [entry for entry in LISTED if not entry["peft_type"]]


def by_name(entries):
    return pytest.mark.parametrize("entry", entries, ids=[entry["name"] for entry in entries])


def test_the_examples_have_every_prefix_kind():
    assert {entry["peft_type"] for entry in LISTED} == {
        *SOFT, "PREFIX_TUNING", "CARTRIDGE", None,
    }  # fmt: skip
    assert {entry["kind"] for entry in LISTED} == {"soft_prompt", "kv_prefix", "hard_prompt"}
    assert len({entry["name"] for entry in LISTED}) == len(LISTED) >= 8


@by_name(LISTED)
def test_every_listed_prefix_has_sample_prompts(entry):
    assert set(entry) == {
        "name", "kind", "peft_type", "path", "summary", "max_tokens", "prompts",
    }  # fmt: skip
    assert entry["max_tokens"] > 0
    assert len(entry["prompts"]) >= 2
    for messages in entry["prompts"]:
        assert [message["role"] for message in messages] == ["user"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@by_name(TRAINED)
def test_every_trained_prefix_is_valid_for_the_demo_model(entry, dtype):
    folder = EXAMPLES / entry["path"]
    raw_config = (folder / "adapter_config.json").read_bytes()
    config = json.loads(raw_config)
    assert config["peft_type"] == entry["peft_type"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == MODEL_ID
    assert config.get("tokenizer_name_or_path") in (None, MODEL_ID)

    kind = entry["kind"]
    assert kind == ("soft_prompt" if entry["peft_type"] in SOFT else "kv_prefix")
    # The store's strict parser validates header, names, shape and all values after the cast.
    weights = folder / "adapter_model.safetensors"
    summary = inspect_peft(raw_config, weights, base=replace(DEMO, dtype=dtype))
    assert (summary.kind, summary.peft_type) == (kind, entry["peft_type"])
    assert summary.num_virtual_tokens == config["num_virtual_tokens"]


@by_name(TEXTS)
def test_every_text_prefix_exists_and_has_no_peft_type(entry):
    assert entry["kind"] == "hard_prompt"
    text = (EXAMPLES / entry["path"] / "prefix.txt").read_text("utf-8")
    assert text.endswith("<|im_end|>\n")  # so that the templated chat starts on a new line


def test_the_example_files_are_small():
    weights = [path.stat().st_size for path in EXAMPLES.rglob("*.safetensors")]
    assert sum(weights) < 2_000_000
    everything = [path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()]
    assert sum(everything) - sum(weights) < 500_000


def test_example_files_contain_no_machine_paths():
    for path in EXAMPLES.rglob("*.json*"):
        text = path.read_text("utf-8")
        for folder in ("/home/", "/root/", "/work/", "/tmp/", "/Users/"):
            assert folder not in text, path


def prompts(file_name):
    lines = (EXAMPLES / "data" / file_name).read_text("utf-8").splitlines()
    return {json.loads(line)["prompt"].lower() for line in lines}


@by_name(LISTED)
def test_held_out_rows_are_not_in_the_training_data(entry):
    task = next(task for task in ALL if task.name == entry["name"])
    held_out = prompts(f"{task.held_out or task.name}.test.jsonl")
    if isinstance(task, Task):
        assert not held_out & prompts(f"{task.rows or task.name}.train.jsonl")
    else:
        shown = (EXAMPLES / entry["path"] / "prefix.txt").read_text("utf-8").lower()
        assert not [prompt for prompt in held_out if prompt in shown]
