"""Families outside transformers' attention interface compute the same over blocks."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.attention import Options
from prefixd.server.model.decoders import DecoderUnavailable, make_decoder
from prefixd.server.model.families import FAMILIES, adapt
from prefixd.server.model.fingerprint import fingerprint_of
from prefixd.server.model.gathered import attended_by
from prefixd.server.model.heads import refuse_indivisible
from prefixd.server.model.int8_decoder import make_int8_decoder
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.row_groups import Group
from prefixd.server.model.selfcheck import self_check
from tests.model.outside_models import OUTSIDE, outside_config, outside_model

EACH = sorted(FAMILIES)


def prepared(model: Any, *, dtype: str = "float32") -> LoadedBase:
    return prepare_base(model, None, name="m", dtype=dtype, device="cpu")


def test_each_family_has_a_model_here() -> None:
    assert {name.partition(",")[0] for name in OUTSIDE} == FAMILIES


@pytest.mark.parametrize("name", OUTSIDE)
def test_logits_over_blocks_are_those_of_transformers(name: str) -> None:
    self_check(prepared(outside_model(name)), block_size=8, prefill_chunk=24)


FAST = {"bloom", "xglm"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EACH]
)
def test_a_family_is_served_in_bfloat16(name: str) -> None:
    self_check(prepared(outside_model(name), dtype="bfloat16"), block_size=8, prefill_chunk=24)


@pytest.mark.parametrize("name", EACH)
def test_adapting_changes_neither_fingerprint_nor_logits(name: str) -> None:
    model = outside_model(name)
    tokens = torch.tensor([[5, 7, 11, 13]])
    fingerprint, logits = fingerprint_of(model, None), model(tokens).logits
    adapted = copy.deepcopy(model)
    adapt(adapted)
    assert fingerprint_of(adapted, None) == fingerprint
    assert prepared(adapted).fingerprint == fingerprint
    torch.testing.assert_close(copy.deepcopy(model)(tokens).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", EACH)
def test_several_processes_cannot_share_a_family(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name}.*cuts its attention by head"):
        refuse_indivisible(outside_config(name), ranks=2)


@pytest.mark.parametrize(
    ("name", "heads", "width"),
    [("falcon", 1, 8), ("falcon, ALiBi", 16, 4), ("falcon, new architecture", 4, 8)],
)
def test_kv_heads_of_falcon_are_those_that_transformers_caches(
    name: str, heads: int, width: int
) -> None:
    base = prepared(outside_model(name))
    assert (base.shape.num_kv_heads, base.shape.head_dim) == (heads, width)
    assert {layer.shape for layer in base.layers.caches.values()} == {(heads, width, width)}


def test_faster_decoders_refuse_a_family_by_name_and_the_module_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = prepared(outside_model("bloom"))
    pool: dict[str, Any] = {"num_blocks": 8, "block_size": 16, "data_folder": tmp_path}
    for choice in ("torch", "scalar"):
        with pytest.raises(DecoderUnavailable, match="m is of the family bloom"):
            make_decoder(base, choice, **pool)
    with pytest.raises(DecoderUnavailable, match="m is of the family bloom"):
        make_int8_decoder(base, "auto", **pool)
    with caplog.at_level(logging.INFO):
        assert make_decoder(base, "auto", **pool).name == "module"
        assert make_decoder(base, "paged", **pool).name == "module"
    assert "m is of the family bloom" in caplog.text
    assert "alibi in layer 0" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_of_xglm_are_those_of_the_serving_dtype(dtype: str, tmp_path: Path) -> None:
    """transformers rounds its table of positions to the dtype that a checkpoint is loaded in."""
    outside_model("xglm").to(torch.bfloat16).save_pretrained(tmp_path)
    as_it_is, served = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded)
        for loaded in ("auto", getattr(torch, dtype))
    )
    base = prepared(as_it_is, dtype=dtype)
    self_check(base, block_size=8, prefill_chunk=24)
    expected = served.model.embed_positions.weights
    torch.testing.assert_close(base.module.model.embed_positions.weights, expected, rtol=0, atol=0)


def test_bloom_without_a_number_of_positions_is_served_as_far_as_the_pool_goes() -> None:
    config = outside_config("bloom")
    del config.max_position_embeddings
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    base = prepare_base(model, None, name="m", dtype="float32", device="cpu", pool_tokens=96)
    assert base.context == base.shape.max_positions == 96
    self_check(base, block_size=8, prefill_chunk=24)


def test_alibi_is_as_exact_far_from_the_start_as_near_it() -> None:
    generator = torch.Generator().manual_seed(0)
    query, *states = (
        torch.randn(*shape, generator=generator) for shape in ((1, 2, 1, 8), (8, 8), (8, 8))
    )
    outputs = []
    for start in (0, 100_000):
        group = Group(
            size=1,
            num_queries=1,
            queries=torch.tensor([0]),
            kv_rows=torch.arange(8),
            mask=None,
            real=None,
            targets=torch.tensor([0]),
            places=torch.arange(start, start + 4)[None],
        )
        out = torch.empty(1, 2, 1, 8)
        slopes = torch.tensor([0.84, 0.071])
        attended = attended_by(
            group, query, (states[0], states[1]), Options(scale=0.3, alibi=slopes)
        )
        out.index_copy_(0, group.targets, attended)
        outputs.append(out)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
