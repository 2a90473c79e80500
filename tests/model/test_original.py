"""A quantized model takes the fingerprint of its original, and of no other model."""

import dataclasses
import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import transformers

from prefixd.server.model import original
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.checkpoint import read_weights
from prefixd.server.model.load import LoadedBase, load_base
from prefixd.server.model.original import check_original, read_original
from tests.model.damaged_folders import Change, config
from tests.model.quantized_folders import plain_folder, torchao_folder
from tests.model.tiny_folder import edit_json, edit_tensors, tiny_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_folder(tmp_path_factory.mktemp("original") / "plain")


@pytest.fixture(scope="module")
def rounded(plain: Path) -> Path:
    return torchao_folder(plain, plain.parent / "rounded", "weights")


def load(folder: Path) -> LoadedBase:
    return load_base(str(folder), dtype="float32", device="cpu", cache_dir=folder)


def bind(original: Path, folder: Path) -> LoadedBase:
    return read_original(str(original), cache_dir=folder).bind(load(folder))


def test_prefixes_are_the_originals_and_kv_is_its_own(plain: Path, rounded: Path) -> None:
    original, own = load(plain), load(rounded)
    bound = bind(plain, rounded)
    assert bound.fingerprint == original.fingerprint != own.fingerprint
    assert bound.weights_fingerprint == own.weights_fingerprint == own.fingerprint
    assert original.weights_fingerprint == original.fingerprint
    fields = {field.name for field in dataclasses.fields(LoadedBase)}
    changed = {name for name in fields if getattr(bound, name) is not getattr(own, name)}
    assert {"fingerprint", "own_fingerprint"} <= changed
    check_original(str(plain), str(rounded), cache_dir=plain)


def test_what_quantizers_change_in_a_config_is_no_difference(
    plain: Path, rounded: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(rounded, tmp_path / "other")
    edit_json(other / "config.json", use_cache=False, pad_token_id=3, architectures=None)
    assert bind(plain, other).fingerprint == load(plain).fingerprint


def other_words(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


def other_values(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    edit_tensors(folder, lambda held: held.update({name: held[name].flip(0).contiguous()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(rms_norm_eps=0.5), "whose rms_norm_eps is 0.5; .* has 1e-06: expected the model"),
        (config(model_type="mistral"), "whose model_type is 'mistral'; .* has 'llama'"),
        (config(max_position_embeddings=64), "whose max_position_embeddings is 64; .* has 128"),
        (other_words, r"whose tokenizer \(301 tokens\) has another added_tokens .* \(300 tokens\)"),
        (other_values, "whose input embeddings differ .* by 1.4 of their size; expected at most"),
    ],
)
def test_another_model_is_refused_with_what_differs(
    change: Change, message: str, plain: Path, rounded: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(plain, tmp_path / "other")
    change(other)
    with pytest.raises(UnsupportedModel, match=f"fingerprint_of names other, {message}"):
        bind(other, rounded)
    if change is not other_values:  # the check without weights
        with pytest.raises(UnsupportedModel, match=message):
            check_original(str(other), str(rounded), cache_dir=plain)


def test_another_size_is_refused_by_name(rounded: Path, tmp_path: Path) -> None:
    wider = plain_folder(tmp_path / "wider", num_attention_heads=4)
    with pytest.raises(UnsupportedModel, match="whose head_dim is 8; rounded has 16"):
        bind(wider, rounded)


def test_the_demo_model_is_not_converted_to_be_refused_an_original(
    plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="original of demo, which is not quantized"):
        check_original(str(plain), "demo", cache_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_plain_model_has_no_original(plain: Path) -> None:
    message = "which is not quantized; expected a quantized model, or no original"
    with pytest.raises(UnsupportedModel, match=message):
        check_original(str(plain), str(plain), cache_dir=plain)
    with pytest.raises(UnsupportedModel, match=message):
        bind(plain, plain)


def test_a_quantized_model_is_no_original(plain: Path, rounded: Path, tmp_path: Path) -> None:
    message = (
        "fingerprint_of names rounded: expected the model that the served one was quantized from; "
        "received one that is quantized with torchao Int8WeightOnlyConfig"
    )
    other = shutil.copytree(rounded, tmp_path / "other")
    for model in (rounded, other, plain):
        with pytest.raises(UnsupportedModel, match=message):
            check_original(str(rounded), str(model), cache_dir=plain)
    with pytest.raises(UnsupportedModel, match=message):
        read_original(str(rounded), cache_dir=plain)


def test_the_weights_of_the_original_are_not_kept(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        module = read_weights(*args, **kwargs)
        modules.append(weakref.ref(module))
        return module

    monkeypatch.setattr(original, "read_weights", watched)
    kept = read_original(str(plain), cache_dir=plain)
    gc.collect()
    assert modules[0]() is None
    assert kept.embeddings.numel() <= 2 * 4096
    assert isinstance(kept.config, transformers.LlamaConfig)
