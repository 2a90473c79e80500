"""The native decoder against transformers: logits, isolation of rows, threads, refusals."""

import ctypes
import random
from copy import deepcopy

import pytest
import torch

from prefixd.server.model.cpu import interface
from tests.model.cpu.native_model import CONFIGS, Native, model_of, reference

KERNELS = pytest.mark.parametrize("kernels", interface.KERNELS)
TEXT = random.Random(1).choices(range(101), k=50)
OTHER = random.Random(2).choices(range(101), k=37)


@pytest.mark.parametrize("name", CONFIGS)
@KERNELS
def test_logits_equal_those_of_transformers(name: str, kernels: str) -> None:
    model = model_of(name)
    native = Native(model, kernels, threads=2)
    expected, of_other = reference(model, TEXT), reference(model, OTHER)
    table, other = [5, 3, 9, 1], [2, 7, 6]

    prefill = native.run([(TEXT[:33], 0, table), (OTHER, 0, other)])
    assert_close(prefill, torch.cat([expected[:33], of_other]))
    chunk = native.run([(TEXT[33:36], 33, table)], outputs=[2])
    assert_close(chunk, expected[35:36])
    for i in range(36, 50):
        assert_close(native.run([(TEXT[i : i + 1], i, table)]), expected[i : i + 1])


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)


@KERNELS
def test_bfloat16_errs_no_more_than_transformers_does(kernels: str) -> None:
    model = model_of("qwen2")
    rounded = Native(model, kernels, dtype=torch.bfloat16)
    exact = reference(model, TEXT)
    half = reference(model_of("qwen2").to(torch.bfloat16), TEXT)
    model_of.cache_clear()
    error = (rounded.run([(TEXT, 0, [1, 2, 3, 4])]) - exact).square().mean().sqrt()
    of_transformers = (half - exact).square().mean().sqrt()
    assert error <= of_transformers * 1.1


@KERNELS
def test_products_of_many_inputs_are_summed_in_spans(kernels: str) -> None:
    """The rounding of one long sum moved scores by several 1e-4 where a prefix enlarges it."""
    model = model_of("wide")
    logits = Native(model, kernels).run([(TEXT, 0, [1, 2, 3, 4])])
    with torch.inference_mode():
        exact = deepcopy(model).double()(torch.tensor([TEXT])).logits[0]
    error = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 1.5e-6  # 3.3e-6 as one sum


@KERNELS
def test_best_is_the_first_of_the_largest_candidates(kernels: str) -> None:
    native = Native(model_of("llama"), kernels)
    step = native.step([(TEXT[:20], 0, [1, 2])])
    step.candidates = 60
    native.ok(native.call.pfx_run(native.decoder, ctypes.byref(step)))
    value, best = step.tensors["logits"][:, :60].max(-1)
    assert step.tensors["best"].tolist() == best.tolist()
    assert step.tensors["best_value"].tolist() == value.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
@KERNELS
def test_row_has_equal_bits_alone_and_in_a_batch(
    kernels: str, name: str, dtype: torch.dtype
) -> None:
    alone = Native(model_of(name), kernels, dtype=dtype)
    shared = Native(model_of(name), kernels, dtype=dtype, threads=2)
    table = [1, 2, 3, 4]
    expected = [alone.run([(TEXT[:48], 0, table)], outputs=[47])[0]]
    expected.append(alone.run([(TEXT[48:49], 48, table)])[0])
    rows = [(OTHER, 0, [10, 11, 12]), (TEXT[:48], 0, table), (OTHER[:5], 0, [20])]
    together = shared.run(rows, outputs=[36, len(OTHER) + 47])
    assert torch.equal(together[1], expected[0])
    # rows that decode after the same blocks are attended together
    decode = [([7], 48, [1, 2, 3, 5 + i]) for i in range(20)]
    together = shared.run([*decode, (TEXT[48:49], 48, table)])
    assert torch.equal(together[20], expected[1])


@KERNELS
def test_nan_stays_in_its_row(kernels: str) -> None:
    native = Native(model_of("qwen2_moe"), kernels, dtype=torch.bfloat16, threads=2)
    clean = Native(model_of("qwen2_moe"), kernels, dtype=torch.bfloat16, threads=2)
    bad = torch.full((1, 45), float("nan"))
    rows = [(TEXT[:9], 0, [1]), ([-1], 0, [2]), (OTHER[:9], 0, [3])]
    step = native.step(rows, inputs=bad)
    native.ok(native.call.pfx_run(native.decoder, ctypes.byref(step)))
    logits = step.tensors["logits"]
    expected = clean.run([rows[0], ([4], 0, [2]), rows[2]])
    assert logits[9].isnan().all()
    assert step.tensors["best_value"][9].isnan()
    keep = [*range(9), *range(10, 19)]
    assert torch.equal(logits[keep], expected[keep])


@KERNELS
def test_inputs_are_embeddings(kernels: str) -> None:
    native = Native(model_of("llama"), kernels)
    embedding = model_of("llama").get_input_embeddings().weight.detach()
    ids = torch.tensor(TEXT[:4], dtype=torch.int32)
    rows = torch.empty(4, 45)
    native.ok(native.call.pfx_read_embeddings(native.decoder, ids.data_ptr(), 4, rows.data_ptr()))
    assert torch.equal(rows, embedding[TEXT[:4]])
    by_id = native.run([(TEXT[:6], 0, [1])])
    by_input = native.run([([-1, -1, -1, -1, *TEXT[4:6]], 0, [2])], inputs=rows)
    assert torch.equal(by_id, by_input)


@KERNELS
def test_kv_goes_out_and_in_and_blocks_are_copied(kernels: str) -> None:
    native = Native(model_of("llama"), kernels)
    expected = native.run([(TEXT[:40], 0, [1, 2, 3])], outputs=[39])
    kv = torch.full((4, 39, 48), float("nan"))
    table = torch.tensor([1, 2, 3], dtype=torch.int32)
    native.ok(native.call.pfx_read_kv(native.decoder, table.data_ptr(), 0, 39, kv.data_ptr()))
    target = torch.tensor([7, 8, 9], dtype=torch.int32)
    native.ok(native.call.pfx_write_kv(native.decoder, target.data_ptr(), 0, 39, kv.data_ptr()))
    assert torch.equal(native.run([(TEXT[39:40], 39, [7, 8, 9])]), expected)
    copies = torch.tensor([11, 12, 13], dtype=torch.int32)
    native.ok(native.call.pfx_copy_blocks(native.decoder, target.data_ptr(), copies.data_ptr(), 3))
    native.ok(native.call.pfx_zero_blocks(native.decoder, target.data_ptr(), 3))
    assert torch.equal(native.run([(TEXT[39:40], 39, [11, 12, 13])]), expected)
    native.ok(native.call.pfx_read_kv(native.decoder, target.data_ptr(), 0, 39, kv.data_ptr()))
    assert not kv.any()


def test_counters_and_memory() -> None:
    native = Native(model_of("llama"), "portable", threads=2)
    counters = interface.Counters()
    native.run([(TEXT, 0, [1, 2, 3, 4])])
    native.run([(TEXT[:1], 0, [5])])
    native.call.pfx_read_counters(native.decoder, ctypes.byref(counters))
    assert counters.steps == 2
    assert 0 <= counters.wait_ns <= counters.step_ns
    assert 0 <= counters.late_steps <= 2
    assert 1 <= counters.threads <= 2
    assert counters.thread_changes >= 2 - counters.threads
    pool = 2 * 2 * 64 * 3 * 16 * 16 * 4
    assert native.call.pfx_num_bytes(native.decoder) > pool


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_outputs": 21}, "num_outputs: expected 0 to 20, got 21"),
        ({"candidates": 102}, "candidates: expected 1 to 101, got 102"),
        ({"table_width": 1}, "table_width: expected at least 2 for row 0, got 1"),
        ({"token_ids": [101] * 20}, "token id: expected -1 to 100, got 101"),
        ({"token_ids": [-1] * 20}, "expected inputs for the tokens of id -1, got NULL"),
        ({"lengths": [19]}, "num_tokens: expected the sum of lengths 19, got 20"),
        ({"lengths": [21]}, "length of row 0: expected 1 to 20, got 21"),
        ({"offsets": [1]}, "offset of row 0: expected 0, got 1"),
        ({"starts": [109]}, "start of row 0: expected 0 to 108, got 109"),
        ({"starts": [-1]}, "start of row 0: expected 0 to 108, got -1"),
        ({"tables": [3, 64, 0, 0, 0, 0, 0, 0]}, "block of row 0: expected 0 to 63, got 64"),
        ({"outputs": [20] * 20}, "output: expected 0 to 19, got 20"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.partition(" expected")[0],
)
def test_step_that_cannot_run_is_refused(change: dict[str, int | list[int]], message: str) -> None:
    native = Native(model_of("llama"), "portable")
    step = native.step([(TEXT[:20], 0, [1, 2])])
    for name, value in change.items():
        if isinstance(value, list):
            step.tensors[name] = torch.tensor(value, dtype=torch.int32)
            setattr(step, name, step.tensors[name].data_ptr())
        else:
            setattr(step, name, value)
    assert native.error_of(step) == f"pfx_run: {message}"
    assert native.run([(TEXT[:20], 0, [1, 2])]).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 2}, "dtype: expected 0 to 1, got 2"),
        ({"num_kv_heads": 4}, "num_heads: expected a multiple of num_kv_heads 4, got 9"),
        ({"head_dim": 24}, "head_dim: expected a multiple of 16, got 24"),
        ({"rotary_dim": 3}, "rotary_dim: expected an even number, got 3"),
        ({"block_size": 8}, "block_size: expected a multiple of 16, got 8"),
        ({"width": 0}, "width: expected 1 to 2147483647, got 0"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.partition(":")[0],
)
def test_shape_that_no_decoder_has_is_refused(change: dict[str, int], message: str) -> None:
    native = Native(model_of("llama"), "portable")
    for name, value in change.items():
        setattr(native.shape, name, value)
    assert not native.call.pfx_new(ctypes.byref(native.shape), 0)
    assert native.library.error() == f"pfx_new: {message}"
    native.shape.num_layers = 2


def test_calls_out_of_order_are_refused() -> None:
    native = Native(model_of("llama"), "portable")
    fresh = native.call.pfx_new(ctypes.byref(native.shape), 0)
    step = native.step([(TEXT[:4], 0, [1])])
    assert native.call.pfx_run(fresh, ctypes.byref(step)) != 0
    assert native.library.error() == "pfx_run: expected pfx_set_rotary before, got none"
    assert native.call.pfx_set_pool(fresh, 0) != 0
    assert native.library.error() == "pfx_set_pool: num_blocks: expected at least 1, got 0"
    native.call.pfx_free(fresh)
    assert native.call.pfx_set_pool(native.decoder, 4) != 0
    blocks = torch.tensor([64], dtype=torch.int32)
    assert native.call.pfx_zero_blocks(native.decoder, blocks.data_ptr(), 1) != 0
    assert native.library.error() == "pfx_zero_blocks: block: expected 0 to 63, got 64"
    assert native.call.pfx_run(None, ctypes.byref(step)) != 0
    assert native.library.error() == "pfx_run: expected a decoder, got NULL"
    assert not native.call.pfx_new(ctypes.byref(native.shape), 9)
    assert "isa: expected one of portable" in native.library.error()


def test_head_with_scales_is_refused() -> None:
    native = Native(model_of("llama"), "portable")
    fresh = native.call.pfx_new(ctypes.byref(native.shape), 0)
    weight, norm, scales = torch.zeros(101, 45, dtype=torch.int8), torch.ones(45), torch.ones(101)
    head = interface.Linear(weight.data_ptr(), None, scales.data_ptr())
    assert native.call.pfx_set_ends(fresh, norm.data_ptr(), ctypes.byref(head), None) != 0
    assert native.library.error() == "pfx_set_ends: head: expected scales NULL, got an address"
    native.call.pfx_free(fresh)
