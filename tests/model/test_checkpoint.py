"""A model's files are loaded whole or refused in one sentence that names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.checkpoint import read_config, read_tokenizer, read_weights
from prefixd.server.model.load import check_folder, load_base
from tests.model.damaged_folders import FILES, WEIGHTS, Change, config, remove, replace
from tests.model.tiny_folder import SIZES, edit_json, save_folder, tiny_llama


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
        "translator": transformers.PegasusForConditionalGeneration(
            transformers.PegasusConfig(
                vocab_size=300,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                max_position_embeddings=32,
            )
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


@pytest.mark.parametrize("case", [*WEIGHTS, *FILES])
def test_a_folder_that_cannot_be_served_is_refused_by_name(
    case: str, copied: Callable[..., Path]
) -> None:
    name, change, message = {**WEIGHTS, **FILES}[case]
    folder = copied(name, change)
    text = refusal(folder)
    assert text.startswith((str(folder), "llama (LlamaForCausalLM): ", "base: ", "pegasus is"))
    with pytest.raises(UnsupportedModel, match=message):
        raise UnsupportedModel(text)


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
        config(auto_map={"AutoModelForCausalLM": "own.M"}),
        config(auto_map={"AutoModelForCausalLM": "someone/model--own.M"}, architectures=None),
        own_tokenizer,
    ],
    ids=["config", "model", "known class", "no class", "tokenizer"],
)
def test_code_of_a_repository_is_not_run_and_causes_no_prompt(
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
    assert "pytorch_model.bin is damaged or holds more than tensors" in refusal(folder)
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


@pytest.mark.parametrize(
    "case",
    [
        "no config",
        "no type",
        "no tokenizer",
        "a vision model",
        "no weights",
        "a shard is missing",
        "one byte short",
        "all in float8",
        "generation config is cut",
    ],
)
def test_the_check_without_weights_refuses_the_same(case: str, copied: Callable[..., Path]) -> None:
    name, change, _ = {**WEIGHTS, **FILES}[case]
    folder = copied(name, change)
    with pytest.raises(UnsupportedModel) as refused:
        check_folder(str(folder), pool_tokens=128, device="cpu")
    assert str(refused.value) == refusal(folder)


def test_parts_are_read_by_transformers(saved: dict[str, Path]) -> None:
    source = str(saved["llama"])
    assert type(read_weights(source, read_config(source))) is transformers.LlamaForCausalLM
    assert len(read_tokenizer(source)) == SIZES["vocab_size"]
