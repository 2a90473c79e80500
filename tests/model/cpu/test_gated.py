"""Gated prefixes and pfx_project in the native decoder: against torch, rows apart, refusals."""

import ctypes
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prefixd.server.model.cpu import interface
from tests.model.cpu.native_model import BLOCK, Native, int8_rows, model_of, reference

KERNELS = pytest.mark.parametrize("kernels", interface.KERNELS)
KINDS = pytest.mark.parametrize(
    ("dtype", "int8"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "int8"],
)
LAYERS, KV_WIDTH, WIDTH, NUM_BLOCKS = 2, 48, 45, 128
TEXT = random.Random(1).choices(range(101), k=50)


def close(values: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(values, expected, rtol=2e-4, atol=2e-4)


class GatedPrefix:
    """Random keys and values [2 * layers, rows, kv width], in blocks of a decoder's pool. In layers
    below the first they are NaN: nothing may read them."""

    def __init__(self, native: Native, rows: int, first: int, blocks: Sequence[int]) -> None:
        self.kv = torch.randn(2 * LAYERS, rows, KV_WIDTH)
        self.kv[: 2 * first] = torch.nan
        self.rows, self.first, self.blocks = rows, first, blocks
        table = torch.tensor(blocks, dtype=torch.int32)
        kv = self.kv.to(native.dtype)
        native.ok(
            native.call.pfx_write_kv(native.decoder, table.data_ptr(), 0, rows, kv.data_ptr())
        )

    @property
    def given(self) -> tuple[int, int, Sequence[int]]:
        return self.rows, self.first, self.blocks


@contextmanager
def with_gated(model: PreTrainedModel, kv: torch.Tensor, first: int) -> Iterator[None]:
    """In the layers from ``first`` on, every query attends to ``kv`` too, with a softmax of its
    own; the result is added before the output projection."""
    hooks = []
    for index, layer in enumerate(model.model.layers[first:], start=first):
        attention, added = layer.self_attn, list[torch.Tensor]()
        shape = (1, kv.shape[1], -1, attention.head_dim)
        keys, values = (each.view(shape).transpose(1, 2) for each in kv[2 * index : 2 * index + 2])

        def attend(
            module: Any,
            _args: Any,
            given: dict[str, Any],
            keys: torch.Tensor = keys,
            values: torch.Tensor = values,
            added: list[torch.Tensor] = added,
        ) -> None:
            hidden = given["hidden_states"]
            queries = module.q_proj(hidden).view(*hidden.shape[:2], -1, module.head_dim)
            if hasattr(module, "q_norm"):
                queries = module.q_norm(queries)
            queries = queries.transpose(1, 2)
            queries, _ = apply_rotary_pos_emb(queries, queries, *given["position_embeddings"])
            out = functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
            added.append(out.transpose(1, 2).flatten(2))

        def add(_module: Any, args: Any, added: list[torch.Tensor] = added) -> Any:
            return (args[0] + added.pop(),)

        hooks.append(attention.register_forward_pre_hook(attend, with_kwargs=True))
        hooks.append(attention.o_proj.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llama", "biased", "qwen3", "qwen2_moe"])
@KERNELS
def test_gated_rows_of_random_sizes_equal_those_in_torch(name: str, kernels: str) -> None:
    model, rng = model_of(name), random.Random(name)
    native = Native(model, kernels, threads=2, blocks=NUM_BLOCKS)
    torch.manual_seed(5)
    for _ in range(3):
        blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)

        def take(positions: int, blocks: list[int] = blocks) -> list[int]:
            return [blocks.pop() for _ in range(-(-positions // BLOCK))]

        rows, prefixes = [], list[GatedPrefix | None]()
        for size in (rng.choice([1, 15, 16, 17, 40]), rng.randint(256, 300), 0, rng.randint(1, 90)):
            text = rng.choices(range(101), k=rng.randint(2, 40))
            rows.append((text, take(len(text))))
            first = rng.randrange(LAYERS)
            prefixes.append(GatedPrefix(native, size, first, take(size)) if size else None)
        given = [None if prefix is None else prefix.given for prefix in prefixes]
        cut = [rng.randint(1, len(text) - 1) for text, _ in rows]
        options = {"gated": given, "width": 24}
        prefill = native.run(
            [(t[:c], 0, b) for (t, b), c in zip(rows, cut, strict=True)], **options
        )
        rest = native.run([(t[c:], c, b) for (t, b), c in zip(rows, cut, strict=True)], **options)
        for (text, _), prefix, start in zip(rows, prefixes, cut, strict=True):
            plain = expected = reference(model, text)
            if prefix is not None:
                with with_gated(model, prefix.kv, prefix.first):
                    expected = reference(model, text)
                assert (expected - plain).abs().max() > 0.1, "the rows change too little"
            logits = torch.cat([prefill[:start], rest[: len(text) - start]])
            close(logits, expected)
            prefill, rest = prefill[start:], rest[len(text) - start :]


@KINDS
@KERNELS
def test_a_gated_row_has_equal_bits_alone_and_in_a_batch(
    kernels: str, dtype: torch.dtype, int8: bool
) -> None:
    alone = Native(model_of("llama"), kernels, dtype=dtype, int8=int8)
    shared = Native(model_of("llama"), kernels, dtype=dtype, int8=int8, threads=2)
    for native in (alone, shared):
        torch.manual_seed(6)
        long = GatedPrefix(native, 70, 0, [30, 31, 32, 33, 34])
        short = GatedPrefix(native, 5, 1, [40])
    row, plain = (TEXT[:40], 0, [1, 2, 3]), (TEXT[:40], 0, [4, 5, 6])
    expected = alone.run([row], gated=[long.given])
    of_base = alone.run([plain])
    assert not torch.equal(expected, of_base)
    batch = [plain, row, (TEXT[40:], 0, [7])]
    together = shared.run(batch, gated=[None, long.given, short.given])
    assert torch.equal(together[:40], of_base)
    assert torch.equal(together[40:80], expected)
    # rows that decode after the same blocks are attended together
    decode = [([7], 40, [1, 2, 41 + i]) for i in range(12)]
    prefixes = [(None, long.given, short.given)[i % 3] for i in range(12)]
    expected = torch.cat([alone.run([decode[i]], gated=[prefixes[i]]) for i in range(12)])
    assert torch.equal(shared.run(decode, gated=prefixes), expected)


@KERNELS
def test_nan_in_gated_rows_stays_in_its_row(kernels: str) -> None:
    native = Native(model_of("qwen2_moe"), kernels, threads=2)
    good = GatedPrefix(native, 20, 0, [30, 31])
    bad = GatedPrefix(native, 20, 0, [32, 33])
    nan = torch.full_like(bad.kv, torch.nan)
    table = torch.tensor(bad.blocks, dtype=torch.int32)
    native.ok(native.call.pfx_write_kv(native.decoder, table.data_ptr(), 0, 20, nan.data_ptr()))
    rows = [(TEXT[:9], 0, [1]), (TEXT[:9], 0, [2]), (TEXT[:9], 0, [3])]
    logits = native.run(rows, gated=[good.given, bad.given, None])
    assert logits[9:18].isnan().all()
    assert logits[:9].isfinite().all()
    assert torch.equal(logits[:9], native.run(rows[:1], gated=[good.given]))
    assert torch.equal(logits[18:], native.run(rows[2:]))


@KINDS
@pytest.mark.parametrize("name", ["llama", "biased", "qwen3"])
@KERNELS
def test_projected_rows_of_random_sizes_equal_those_in_torch(
    name: str, kernels: str, dtype: torch.dtype, int8: bool
) -> None:
    model, rng = model_of(name), random.Random(name)
    native = Native(model, kernels, dtype=dtype, int8=int8, threads=2, blocks=1)
    torch.manual_seed(7)
    for rows in (1, 2, rng.randint(3, 40), rng.randint(90, 250)):
        layer = rng.randrange(LAYERS)
        inputs = torch.randn(rows, WIDTH).to(dtype)
        out = torch.full((2, rows + 1, KV_WIDTH), 7.0)  # what is behind the last row stays
        addresses = [part.data_ptr() for part in out]
        native.ok(
            native.call.pfx_project(native.decoder, layer, inputs.data_ptr(), rows, *addresses)
        )
        attention = model.model.layers[layer].self_attn
        for linear, result in zip((attention.k_proj, attention.v_proj), out, strict=True):
            bias = None if linear.bias is None else linear.bias.to(dtype).float()
            weight, values = linear.weight.to(dtype).float(), inputs.float()
            if int8:
                weight, values = (
                    codes * scales[:, None] for codes, scales in map(int8_rows, (weight, values))
                )
            expected = functional.linear(values, weight, bias)
            torch.testing.assert_close(result[:rows], expected, rtol=1e-5, atol=1e-5)
            assert (result[rows] == 7).all()


def test_project_that_cannot_run_is_refused() -> None:
    native = Native(model_of("llama"), "portable", blocks=1)
    inputs, keys, values = torch.randn(3, WIDTH), torch.zeros(3, KV_WIDTH), torch.zeros(3, KV_WIDTH)
    good: list[Any] = [native.decoder, 1, inputs.data_ptr(), 3, keys.data_ptr(), values.data_ptr()]
    missing = "expected inputs, keys and values, got NULL"
    for place, value, message in [
        (0, None, "expected a decoder, got NULL"),
        (1, -1, "layer: expected 0 to 1, got -1"),
        (1, 2, "layer: expected 0 to 1, got 2"),
        (2, None, missing),
        (3, -1, "rows: expected 0 or more, got -1"),
        (4, None, missing),
        (5, None, missing),
    ]:
        arguments = [*good[:place], value, *good[place + 1 :]]
        assert native.call.pfx_project(*arguments) != 0
        assert native.library.error() == f"pfx_project: {message}"
    native.ok(native.call.pfx_project(native.decoder, 0, None, 0, None, None))
    assert not keys.any()
    native.ok(native.call.pfx_project(*good))
    assert keys.all()
    fresh = native.call.pfx_new(ctypes.byref(native.shape), 0)
    assert native.call.pfx_project(fresh, *good[1:]) != 0
    assert native.library.error() == "pfx_project: expected pfx_set_rotary before, got none"
    native.call.pfx_free(fresh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gated_width": -1}, "gated_width: expected 0 to 64, got -1"),
        ({"gated_width": 65}, "gated_width: expected 0 to 64, got 65"),
        ({"gated_width": 1}, "gated_count of row 1: expected 0 to 16, got 20"),
        ({"gated_counts": [0, -1]}, "gated_count of row 1: expected 0 to 32, got -1"),
        ({"gated_counts": [33, 20]}, "gated_count of row 0: expected 0 to 32, got 33"),
        (
            {"gated_counts": [0, 2**31 - 1]},
            "gated_count of row 1: expected 0 to 32, got 2147483647",
        ),
        ({"gated_layers": [0, -1]}, "gated_layer of row 1: expected 0 to 1, got -1"),
        ({"gated_layers": [0, 2]}, "gated_layer of row 1: expected 0 to 1, got 2"),
        ({"gated_tables": [0, 0, 5, 64]}, "gated_block of row 1: expected 0 to 63, got 64"),
        ({"gated_tables": [0, 0, -1, 5]}, "gated_block of row 1: expected 0 to 63, got -1"),
        ({"gated_layers": None}, "expected gated_layers and gated_tables, got NULL"),
        ({"gated_tables": None}, "expected gated_layers and gated_tables, got NULL"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_step_whose_gated_rows_cannot_be_read_is_refused(
    change: dict[str, int | list[int] | None], message: str
) -> None:
    native = Native(model_of("llama"), "portable")
    prefix = GatedPrefix(native, 20, 0, [30, 31])
    rows = [(TEXT[:9], 0, [1]), (TEXT[:20], 0, [2, 3])]
    step = native.step(rows, gated=[None, prefix.given])
    for name, value in change.items():
        if isinstance(value, list):
            step.tensors[name] = torch.tensor(value, dtype=torch.int32)
            setattr(step, name, step.tensors[name].data_ptr())
        else:
            setattr(step, name, value)
    assert native.error_of(step) == f"pfx_run: {message}"
    assert (step.tensors["logits"] == -1).all()
    assert native.run(rows, gated=[None, prefix.given]).isfinite().all()


def test_entries_that_no_gated_row_needs_are_not_read() -> None:
    native = Native(model_of("llama"), "portable")
    prefix = GatedPrefix(native, 20, 0, [30, 31])
    rows = [(TEXT[:9], 0, [1]), (TEXT[:9], 0, [2])]
    expected = native.run(rows, gated=[None, prefix.given])
    step = native.step(rows, gated=[None, prefix.given])
    step.tensors["gated_layers"][0] = 99
    tables = torch.tensor([[99, -1, 99], [30, 31, -1]], dtype=torch.int32)
    step.gated_tables, step.gated_width = tables.data_ptr(), 3
    native.ok(native.call.pfx_run(native.decoder, ctypes.byref(step)))
    assert torch.equal(step.tensors["logits"], expected)
    step.gated_counts = None  # without counts there are no gated rows, and nothing else is read
    step.gated_layers, step.gated_tables, step.gated_width = 1, 1, -1
    native.ok(native.call.pfx_run(native.decoder, ctypes.byref(step)))
    assert torch.equal(step.tensors["logits"], native.run(rows))
