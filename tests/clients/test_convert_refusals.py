"""Checkpoints that hold something else than a prefix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.client.errors import FormatError
from tests.clients.foreign_files import parameters, read

PL = parameters(torch.zeros(2, 1, 3, 4))
EMPTY = torch.nn.ParameterList()
WIDE = torch.zeros(3, 4)


def encoder_of(**weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"prefix_encoder.{name.replace('_', '.')}": weight for name, weight in weights.items()}


TRANS = {
    "embedding_weight": torch.zeros(2, 3),
    "trans_0_weight": torch.zeros(4, 3),
    "trans_0_bias": torch.zeros(4),
    "trans_2_weight": torch.zeros(8, 4),
    "trans_2_bias": torch.zeros(8),
}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"expected embeddings \[tokens, hidden\], found the shape \[3\]"),
        (torch.zeros(0, 3), r"found the shape \[0, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "expected floating-point numbers, found int64"),
        ([WIDE], "expected tensors, found a list"),
        ({}, "found the names $"),
        ({"lm_head.weight": WIDE}, "found the names 'lm_head.weight'"),
        ({"prompt_embeddings": WIDE}, r"expected adapter_config\.json next to them"),
        ({"prefix_encoder.embedding.weight": "x"}, "expected a tensor, found 'x'"),
        (
            {"trainable_keys": PL, "trainable_values": PL, "frozen_keys": PL},
            "expected a cartridge with frozen_keys, frozen_values, trainable_keys",
        ),
        (
            {
                "trainable_keys": PL,
                "trainable_values": PL,
                "frozen_keys": EMPTY,
                "frozen_values": EMPTY,
                "segment_keys": PL,
            },
            "found 'trainable_keys', 'trainable_values', 'frozen_keys', 'frozen_values' and 1 more",
        ),
        (
            {
                "trainable_keys": PL,
                "trainable_values": parameters(torch.zeros(3, 1, 3, 4)),
                "frozen_keys": EMPTY,
                "frozen_values": EMPTY,
            },
            "expected trainable_keys and trainable_values to list the same layers",
        ),
        (
            {
                "trainable_keys": PL,
                "trainable_values": parameters(torch.zeros(2, 1, 3, 5)),
                "frozen_keys": EMPTY,
                "frozen_values": EMPTY,
            },
            r"tensors of one shape \[1, KV heads, tokens, head_dim\].*found a tensor of shape",
        ),
        (
            {
                "trainable_keys": PL,
                "trainable_values": PL,
                "frozen_keys": parameters(torch.zeros(2, 2, 3, 4)),
                "frozen_values": parameters(torch.zeros(2, 2, 3, 4)),
            },
            "expected the same layers, KV heads and head_dim",
        ),
        (
            {
                "trainable_keys": PL,
                "trainable_values": PL,
                "frozen_keys": parameters(torch.zeros(2, 1, 3, 4).half()),
                "frozen_values": parameters(torch.zeros(2, 1, 3, 4).half()),
            },
            "cartridge: expected one dtype, found float16, float32",
        ),
        (
            {
                "trainable_keys": EMPTY,
                "trainable_values": EMPTY,
                "frozen_keys": None,
                "frozen_values": None,
            },
            "expected the same layers",
        ),
        (encoder_of(embedding_weight=torch.zeros(3)), r"found the shape \[3\]"),
        (
            encoder_of(embedding_weight=WIDE, trans_0_weight=WIDE),
            "expected embedding.weight, trans.0.bias, trans.0.weight, trans.2.bias, trans.2.weight",
        ),
        (
            encoder_of(**TRANS | {"trans_2_weight": torch.zeros(8, 5)}),
            "embedding.weight, trans.0 and trans.2 that fit together",
        ),
        (
            encoder_of(**TRANS | {"trans_0_bias": torch.zeros(1)}),
            "embedding.weight, trans.0 and trans.2 that fit together",
        ),
        (
            encoder_of(embedding_weight=WIDE)
            | {"a.prefix_encoder.embedding.weight": torch.zeros(3, 4)},
            "expected one prefix encoder, found 'prefix_encoder.', 'a.prefix_encoder.'",
        ),
    ],
    ids=range(20),
)
def test_other_checkpoints(value: Any, message: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=message) as raised:
        read(tmp_path / "x.pt")
    assert str(raised.value).startswith(f"{tmp_path}/x.pt: ")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"prompt_embeddings": WIDE, "base_model.lm_head.weight": WIDE},
            (
                "expected prompt_embeddings; found 'prompt_embeddings', "
                "'base_model.lm_head.weight'. A prefix must not carry weights of the base model"
            ),
        ),
        (
            {"prompt_embeddings": WIDE, "prefix_task_cols": WIDE},
            "expected prefix_task_cols, prefix_task_rows, prompt_embeddings; found",
        ),
        ({"prompt_embeddings": 1}, "prompt_embeddings: expected a tensor, found 1"),
        ([WIDE], "expected tensors by name, found a list"),
    ],
    ids=range(4),
)
def test_other_adapters(adapter: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save(adapter, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError) as raised:
        read(tmp_path)
    assert message in str(raised.value)


def test_repeated_weights_cannot_expand_a_small_file(tmp_path: Path) -> None:
    one = torch.nn.Parameter(torch.zeros(1, 1, 2**20, 1))
    layers = torch.nn.ParameterList([one] * 200)
    parts = {"trainable_keys": layers, "trainable_values": layers}
    torch.save(parts | {"frozen_keys": EMPTY, "frozen_values": EMPTY}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="expected at most 1073741824 bytes of values"):
        read(tmp_path / "x.pt")
    rows, columns = torch.zeros(2**16, 1), torch.zeros(2**16, 1)
    weights = TRANS | {"embedding_weight": rows, "trans_0_weight": torch.zeros(4, 1)}
    weights |= {"trans_0_bias": torch.zeros(4), "trans_2_weight": columns.expand(-1, 4).clone()}
    weights |= {"trans_2_bias": torch.zeros(2**16)}
    torch.save(encoder_of(**weights), tmp_path / "x.bin")
    with pytest.raises(FormatError, match="expected at most 1073741824 bytes of values"):
        read(tmp_path / "x.bin")
