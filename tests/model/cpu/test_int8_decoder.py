"""Layers in int8 in the native decoder: against plain rounding in torch, rows apart, refusals."""

import ctypes
import random

import pytest
import torch

from prefixd.server.model.cpu import interface
from tests.model.cpu.native_model import CONFIGS, Native, int8_layers, model_of, reference

KERNELS = pytest.mark.parametrize("kernels", interface.KERNELS)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
TEXT = random.Random(1).choices(range(101), k=50)
OTHER = random.Random(2).choices(range(101), k=37)


@pytest.mark.parametrize("name", CONFIGS)
@KERNELS
def test_logits_equal_those_of_rounding_in_torch(name: str, kernels: str) -> None:
    """As close as in float32, but where another order of a sum makes an input round otherwise: what
    depends on it then differs by a part of its step."""
    native = Native(model_of(name), kernels, threads=2, int8=True)
    with int8_layers(model_of(name)) as rounded:
        expected, of_other = reference(rounded, TEXT), reference(rounded, OTHER)
    prefill = native.run([(TEXT[:49], 0, [5, 3, 9, 1]), (OTHER, 0, [2, 7, 6])])
    decode = native.run([(TEXT[49:], 49, [5, 3, 9, 1])])
    differences = torch.cat([prefill, decode]) - torch.cat([expected[:49], of_other, expected[49:]])
    assert differences.abs().median() < 1e-5 * expected.std()
    assert differences.abs().max() < 0.1 * expected.std()


@KERNELS
def test_bfloat16_adds_its_own_error_only(kernels: str) -> None:
    model = model_of("qwen2_moe")
    exact = reference(model, TEXT)
    with int8_layers(model) as rounded:
        of_int8 = error_of(reference(rounded, TEXT), exact)
    table = [1, 2, 3, 4]
    half = Native(model, kernels, dtype=torch.bfloat16).run([(TEXT, 0, table)])
    both = Native(model, kernels, dtype=torch.bfloat16, int8=True).run([(TEXT, 0, table)])
    assert 0.5 * of_int8 < error_of(both, exact) < 1.2 * (of_int8 + error_of(half, exact))


def error_of(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return (logits - exact).square().mean().sqrt().item()


@DTYPES
@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
@KERNELS
def test_row_has_equal_bits_alone_and_in_a_batch(
    kernels: str, name: str, dtype: torch.dtype
) -> None:
    alone = Native(model_of(name), kernels, dtype=dtype, int8=True)
    shared = Native(model_of(name), kernels, dtype=dtype, threads=2, int8=True)
    table = [1, 2, 3, 4]
    prompt = alone.run([(TEXT[:48], 0, table)], outputs=[47])[0]
    token = alone.run([(TEXT[48:49], 48, table)])[0]
    rows = [(OTHER, 0, [10, 11, 12]), (TEXT[:48], 0, table), (OTHER[:5], 0, [20])]
    together = shared.run(rows, outputs=[36, len(OTHER) + 47])
    assert torch.equal(together[1], prompt)
    decode = [([7], 48, [1, 2, 3, 5 + i]) for i in range(40)]
    assert torch.equal(shared.run([*decode, (TEXT[48:49], 48, table)])[40], token)


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@KERNELS
def test_nan_and_infinity_stay_in_their_row(kernels: str, value: float, dtype: torch.dtype) -> None:
    native = Native(model_of("qwen2_moe"), kernels, dtype=dtype, threads=2, int8=True)
    bad = torch.zeros(1, 45)
    bad[0, 44] = value
    rows = [(TEXT[:9], 0, [1]), ([-1], 0, [2]), (OTHER[:9], 0, [3])]
    logits = native.run(rows, inputs=bad)
    clean = Native(model_of("qwen2_moe"), kernels, dtype=dtype, threads=2, int8=True)
    expected = clean.run([rows[0], ([4], 0, [2]), rows[2]])
    keep = [*range(9), *range(10, 19)]
    assert logits[9].isnan().all()
    assert torch.equal(logits[keep], expected[keep])


def test_layers_take_a_quarter_of_the_memory() -> None:
    def layers_bytes(*, int8: bool) -> int:
        native = Native(model_of("llama"), "portable", int8=int8, blocks=1)
        ends = (45 * 104 + 2 * 128 * 8) * 4  # head in whole panels, rotary tables
        return native.call.pfx_num_bytes(native.decoder) - 2 * 2 * 3 * 16 * 16 * 4 - ends

    # Scales and norms stay in float32, panels are padded.
    assert 0.25 < layers_bytes(int8=True) / layers_bytes(int8=False) < 0.35


WIDTH, HEADS, KV_HEADS, INNER, EXPERTS, EXPERT_INNER = 45, 144, 48, 53, 3, 21
SIZES = {
    "q": (HEADS, WIDTH), "k": (KV_HEADS, WIDTH), "v": (KV_HEADS, WIDTH), "o": (WIDTH, HEADS),
    "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER),
    "expert_gate_up": (EXPERTS * 2 * EXPERT_INNER, WIDTH),
    "expert_down": (EXPERTS * WIDTH, EXPERT_INNER),
}  # fmt: skip


class Int8Layer:
    """A layer of ones in int8 with scales of 0.5, all of whose weights may be changed."""

    def __init__(self, *, experts: bool) -> None:
        self.norm, self.router = torch.ones(WIDTH), torch.ones(EXPERTS, WIDTH)
        self.codes = {name: torch.ones(*size, dtype=torch.int8) for name, size in SIZES.items()}
        self.scales = {name: torch.full((rows,), 0.5) for name, (rows, _) in SIZES.items()}
        self.without_scales: set[str] = set()
        self.experts = experts

    def given(self) -> interface.Layer:
        def scales_of(name: str) -> int | None:
            return None if name in self.without_scales else self.scales[name].data_ptr()

        norm = self.norm.data_ptr()
        layer = interface.Layer(input_norm=norm, post_norm=norm, inner=INNER)
        dense = () if self.experts else ("gate", "up", "down")
        for name in ("q", "k", "v", "o", *dense):
            linear = interface.Linear(self.codes[name].data_ptr(), None, scales_of(name))
            setattr(layer, name, linear)
        if self.experts:
            layer.experts, layer.experts_per_token, layer.expert_inner = EXPERTS, 1, EXPERT_INNER
            layer.router = self.router.data_ptr()
            for name in ("expert_gate_up", "expert_down"):
                setattr(layer, name, self.codes[name].data_ptr())
                setattr(layer, f"{name}_scales", scales_of(name))
        return layer


def error_of_layer(layer: interface.Layer) -> str | None:
    """What a fresh decoder says of a layer; None where it takes it."""
    native = Native(model_of("llama"), "portable", blocks=1)
    fresh = native.call.pfx_new(ctypes.byref(native.shape), 0)
    failed = native.call.pfx_set_layer(fresh, 0, ctypes.byref(layer))
    native.call.pfx_free(fresh)
    return native.library.error() if failed else None


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -0.5, 0.0])
@pytest.mark.parametrize("name", SIZES)
def test_scale_that_is_no_finite_number_above_0_is_refused(name: str, scale: float) -> None:
    layer = Int8Layer(experts=name.startswith("expert"))
    row = SIZES[name][0] - 1
    layer.scales[name][row] = scale
    expected = f"{name}: scale of row {row}: expected a finite number above 0, got {scale:g}"
    assert error_of_layer(layer.given()) == f"pfx_set_layer: {expected}"


@pytest.mark.parametrize("name", SIZES)
def test_weight_of_minus_128_is_refused(name: str) -> None:
    layer = Int8Layer(experts=name.startswith("expert"))
    layer.codes[name][2, -1] = -128
    expected = f"{name}: weight of row 2: expected -127 to 127, got -128"
    assert error_of_layer(layer.given()) == f"pfx_set_layer: {expected}"


@pytest.mark.parametrize("name", SIZES)
def test_row_of_zeros_may_have_a_scale_of_0(name: str) -> None:
    layer = Int8Layer(experts=name.startswith("expert"))
    layer.codes[name][1], layer.scales[name][1] = 0, 0.0
    assert error_of_layer(layer.given()) is None
    layer.scales[name][1] = float("nan")
    assert "expected a finite number above 0, got nan" in str(error_of_layer(layer.given()))


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["q"], "q, k and v: expected scales of all 3 or none, got 2"),
        (["k", "v"], "q, k and v: expected scales of all 3 or none, got 1"),
        (["up"], "gate and up: expected scales of all 2 or none, got 1"),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, list) else None,
)
def test_scales_of_some_that_are_multiplied_together_are_refused(
    without: list[str], message: str
) -> None:
    layer = Int8Layer(experts=False)
    layer.without_scales.update(without)
    assert error_of_layer(layer.given()) == f"pfx_set_layer: {message}"


def test_scales_without_weights_are_refused() -> None:
    dense, sparse = Int8Layer(experts=False), Int8Layer(experts=True)
    layer = dense.given()
    layer.expert_down_scales = layer.o.scales
    expected = "expected scales of experts NULL without experts, got an address"
    assert error_of_layer(layer) == f"pfx_set_layer: {expected}"
    layer = sparse.given()
    layer.down.scales = layer.o.scales
    expected = "down: expected weights for the scales, got NULL"
    assert error_of_layer(layer) == f"pfx_set_layer: {expected}"


def test_more_inputs_than_an_int32_sum_holds_are_refused() -> None:
    layer = Int8Layer(experts=False)
    layer.without_scales = {"gate", "up"}
    given = layer.given()
    given.inner = 133_145  # refused before any weight is read
    expected = "down: expected at most 133144 inputs of int8, got 133145"
    assert error_of_layer(given) == f"pfx_set_layer: {expected}"
