"""Values and configs of converted prefixes."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixd.client.convert.sources import Source
from prefixd.client.errors import FormatError
from prefixd.client.folders import PeftContent
from tests.clients.foreign_files import (
    PrefixEncoder,
    embeddings,
    read,
    save_cartridge,
    save_encoder,
    save_kobold,
    tensors,
    words,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONTAINERS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def config(prefix: Source) -> dict[str, Any]:
    assert isinstance(prefix.content, PeftContent)
    assert isinstance(prefix.content.config, bytes)
    fields: dict[str, Any] = json.loads(prefix.content.config)
    return fields


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@CONTAINERS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_container_of_torch_save(
    protocol: int, zipped: bool, tmp_path: Path
) -> None:
    for dtype in DTYPES:
        values = torch.randn(3, 4).to(dtype)
        torch.save(
            values,
            tmp_path / "decoder.pt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        prefix = read(tmp_path / "decoder.pt", task_id=7)
        assert same_bits(embeddings(prefix), values)
        assert prefix.task_id == 7  # sent, so that the server refuses it
    assert config(prefix) == {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 3,
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "token_dim": 4,
    }


@CONTAINERS
def test_views_of_one_storage(zipped: bool, tmp_path: Path) -> None:
    storage = torch.arange(24.0).view(4, 6)
    views = {"transposed": storage.t(), "rows": storage[1:3], "columns": storage[:, 2:5]}
    for view in views.values():
        torch.save(
            {"prefix_encoder.embedding.weight": view, "other": storage},
            tmp_path / "x.bin",
            _use_new_zipfile_serialization=zipped,
        )
        prefix = read(tmp_path / "x.bin")
        assert torch.equal(embeddings(prefix), view)
        assert prefix.notes == ("left out 1 tensors that are not of the prefix encoder",)


def test_a_state_dict_with_its_metadata(tmp_path: Path) -> None:
    encoder = PrefixEncoder(tokens=2, width=24, hidden=3)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    converted = embeddings(read(tmp_path))
    assert torch.allclose(converted, encoder().detach(), atol=1e-6)


def test_float64_is_rounded_to_float32(tmp_path: Path) -> None:
    values = torch.tensor([[0.1, 1e300]], dtype=torch.float64)
    torch.save(values, tmp_path / "decoder.pt")
    np.save(tmp_path / "table.npy", values.numpy())
    for name in ("decoder.pt", "table.npy"):
        assert same_bits(embeddings(read(tmp_path / name)), values.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_multitask_adapter_keeps_its_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = {
        "prompt_embeddings": torch.randn(2, 4).to(dtype),
        "prefix_task_cols": torch.randn(3, 2, 1).to(dtype),
        "prefix_task_rows": torch.randn(3, 1, 4).to(dtype),
    }
    torch.save(adapter, tmp_path / "adapter_model.bin")
    text = '{"peft_type": "MULTITASK_PROMPT_TUNING"}'
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "prefixd.json").write_text('{"task_id": 1, "metadata": {"a": 1}}')
    prefix = read(tmp_path, task_id=2)
    loaded = tensors(prefix)
    assert loaded.keys() == adapter.keys()
    assert all(same_bits(loaded[name], adapter[name]) for name in adapter)
    content = prefix.content
    assert isinstance(content, PeftContent)
    assert (content.task_id, prefix.task_id, content.metadata) == (1, 2, {"a": 1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adaption_prompt_keeps_its_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = "base_model.model.model.layers.1.self_attn"
    adapter = {
        f"{layer}.adaption_prompt": torch.randn(1, 3, 4).to(dtype),
        f"{layer}.adaption_gate": torch.randn(1).to(dtype),
    }
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADAPTION_PROMPT"}')
    torch.save(adapter, tmp_path / "adapter_model.bin")
    loaded = tensors(read(tmp_path))
    assert loaded.keys() == adapter.keys()
    assert all(same_bits(loaded[name], adapter[name]) for name in adapter)
    torch.save({**adapter, "lm_head.weight": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        read(tmp_path)


def test_the_config_of_a_cartridge(tmp_path: Path) -> None:
    keys, values = torch.randn(2, 3, 2, 5, 4).bfloat16()
    save_cartridge(tmp_path / "cache.pt", keys, values, frozen=1)
    prefix = read(tmp_path / "cache.pt")
    expected = {"peft_type": "CARTRIDGE", "num_virtual_tokens": 5, "num_frozen_tokens": 1}
    expected |= {"num_layers": 3, "num_attention_heads": 2, "token_dim": 8}
    assert expected.items() <= config(prefix).items()
    by_token = embeddings(prefix).view(5, 3, 2, 2, 4)
    assert same_bits(by_token[:, :, 0], keys.permute(2, 0, 1, 3))
    assert same_bits(by_token[:, :, 1], values.permute(2, 0, 1, 3))


def test_the_base_next_to_a_prefix_encoder_gives_its_layers(tmp_path: Path) -> None:
    encoder = PrefixEncoder(tokens=2, width=24, hidden=None)
    save_encoder(tmp_path / "pytorch_model.bin", encoder, lead="model.prefix_encoder.")
    assert "num_layers" not in config(read(tmp_path))
    for field in ("num_hidden_layers", "num_layers"):
        (tmp_path / "config.json").write_text(json.dumps({field: 3}))
        assert config(read(tmp_path))["num_layers"] == 3
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 5}')
    with pytest.raises(FormatError, match="says 5 layers, which do not divide the 24 columns"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(FormatError, match="not valid JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "num_layers" not in config(read(tmp_path))


def test_tasks_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    table = torch.randn(2, 3, 4).half()
    table[1, 2] = 0
    np.save(path, table.numpy())
    assert same_bits(embeddings(read(path, task_id=0)), table[0])
    padded = read(path, task_id=1)
    assert same_bits(embeddings(padded), table[1, :2])
    assert (padded.notes, padded.task_id) == (("left out 1 rows of padding",), None)
    for task_id in (2, -1):
        with pytest.raises(FormatError, match=f"a task id from 0 to 1, found {task_id}"):
            read(path, task_id=task_id)
    np.save(path, table[1].numpy())  # one task: its zeros were trained
    assert same_bits(embeddings(read(path)), table[1])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2", "<f8"])
def test_byte_and_axis_orders_of_numpy(dtype: str, order: Any, tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "table.npy", np.asarray(values.astype(dtype), order=order))
    assert embeddings(read(tmp_path / "table.npy")).float().numpy().tolist() == values.tolist()


def test_bfloat16_words_of_numpy(tmp_path: Path) -> None:
    values = torch.randn(2, 3).bfloat16()
    for array in (words(values), words(values).view("<u2"), words(values).astype("V2")):
        np.save(tmp_path / "table.npy", array)
        assert same_bits(embeddings(read(tmp_path / "table.npy")), values)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_soft_prompt_of_koboldai(compression: int, tmp_path: Path) -> None:
    values = torch.randn(2, 3).half()
    meta = {"name": "Noir", "author": "", "supported": ["a"], "description": None}
    save_kobold(tmp_path / "lzma.zip", values.numpy(), meta)
    prefix = read(tmp_path / "lzma.zip")
    assert same_bits(embeddings(prefix), values)
    assert prefix.content.metadata == {"name": "Noir", "supported": ["a"]}
    with zipfile.ZipFile(tmp_path / "lzma.zip") as lzma:
        array = lzma.read("tensor.npy")
    with zipfile.ZipFile(tmp_path / "other.zip", "w", compression=compression) as archive:
        archive.writestr("tensor.npy", array)
    other = read(tmp_path / "other.zip")
    assert same_bits(embeddings(other), values)
    assert other.content.metadata is None
