"""Smoothing changes nothing, rounding errs by half a step, and calibration sees every input."""

from dataclasses import replace

import pytest
import torch

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.calibration import find_peaks
from prefixd.server.model.int8 import Int8Parts, Peaks, round_layer, round_rows, smooth
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.parts import Dense, Layer, Parts
from prefixd.server.model.plain_texts import CALIBRATION, EVALUATION, tokens_of
from tests.golden.families import family_model
from tests.model.int8_reference import Reference, codes_of
from tests.model.test_decoders import EXACT, base_of
from tests.model.tiny_folder import tiny_llama, tiny_tokenizer

TEXTS = [list(range(5, 60)), list(range(100, 130))]


def biased_base(dtype: str = "float32") -> LoadedBase:
    """A Llama whose linears all have biases."""
    model = tiny_llama(attention_bias=True, mlp_bias=True, hidden_size=40, head_dim=16)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    return prepare_base(model, tiny_tokenizer(), name="biased", dtype=dtype, device="cpu")


class SmoothedParts(Int8Parts):
    """Smoothed and not rounded."""

    def take_layers(self):
        for layer, peaks in zip(Parts.take_layers(self), self._peaks, strict=True):
            yield smooth(layer, peaks, name="m")


@pytest.mark.parametrize("family", [*EXACT, "biased"])
def test_smoothing_changes_no_logit(family: str) -> None:
    """Factors are powers of two: not even by rounding."""
    base, same = (
        (biased_base(), biased_base()) if family == "biased" else (base_of(family), base_of(family))
    )
    peaks = find_peaks(base, TEXTS, block_size=16)
    smoothed, plain = Reference(SmoothedParts(base, peaks)), Reference(Parts(same))
    assert torch.equal(smoothed.logits(TEXTS[0]), plain.logits(TEXTS[0]))
    assert not torch.equal(smoothed._layers[0].input_norm, plain._layers[0].input_norm)


def test_smoothing_is_exact_in_bfloat16() -> None:
    base = biased_base("bfloat16")
    peaks = find_peaks(base, TEXTS, block_size=16)
    original = list(Parts(biased_base("bfloat16")).take_layers())
    for layer, before, of_layer in zip(Parts(base).take_layers(), original, peaks, strict=True):
        smoothed = smooth(layer, of_layer, name="m")
        factors = before.input_norm.float() / smoothed.input_norm.float()
        assert set(torch.frexp(factors).mantissa.tolist()) == {0.5}
        assert torch.equal(smoothed.q.weight, before.q.weight.float() * factors)


def test_smoothing_shares_the_range_of_inputs_and_weights() -> None:
    """A channel whose inputs are 64 times as large gets an eighth of the inputs."""
    layer = first_layer()
    width = len(layer.input_norm)
    ones = replace(layer.q, weight=torch.ones(8, width))
    layer = replace(layer, q=ones, k=ones, v=ones)
    inputs = torch.ones(width)
    inputs[3] = 64
    smoothed = smooth(layer, Peaks(inputs, None, None), name="m")
    factors = layer.input_norm / smoothed.input_norm
    assert factors[3] / factors[4] == 8
    assert torch.equal(smoothed.v.weight[0], factors)


@pytest.mark.parametrize("dead", ["inputs", "weights", "both"])
def test_channels_that_were_never_reached_get_finite_factors(dead: str) -> None:
    layer = first_layer()
    assert isinstance(layer.mlp, Dense)
    width, inner = len(layer.input_norm), len(layer.mlp.up.weight)
    seen = [torch.full((size,), 2.0) for size in (width, width, inner)]
    if dead in {"inputs", "both"}:
        seen[0][:5] = 0
        seen[1][:] = 0
        seen[2][1:] = 0
    if dead in {"weights", "both"}:
        for linear in (layer.q, layer.k, layer.v, layer.mlp.gate, layer.mlp.up, layer.mlp.down):
            linear.weight[:, :7] = 0
    rounded = round_layer(smooth(layer, Peaks(*seen), name="layer"), name="layer")
    assert isinstance(rounded.mlp, Dense)
    for norm in (rounded.input_norm, rounded.post_norm):
        assert norm.isfinite().all()
        assert (norm > 0).all()
    for linear in (rounded.q, rounded.v, rounded.mlp.up, rounded.mlp.down):
        assert linear.scales is not None
        assert linear.scales.isfinite().all()
        assert (linear.scales > 0).all()


def first_layer() -> Layer:
    return next(Parts(base_of()).take_layers())


def test_rounding_errs_by_half_a_step() -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    weight[8] *= 1e-30
    weight[9] *= 1e30
    weight[10] = 1e-42  # a denormal: its scale would be 0
    codes, scales = round_rows(weight, "w")
    assert codes.dtype == torch.int8
    assert codes.abs().amax(1).tolist() == [127] * 7 + [0] + [127] * 2 + [0] + [127] * 29
    error = (codes.double() * scales[:, None].double() - weight.double()).abs()
    assert (error <= scales[:, None].double() * 0.50001).all()


def test_codes_are_symmetric_and_ties_go_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -2.5, -127.0]])
    codes, scales = round_rows(weight, "w")
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -127]]
    assert codes_of(weight)[0].tolist() == codes.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("family", "weight", "named"),
    [
        ("llama", "self_attn.k_proj.weight", "k has the value (nan|inf) in column 3"),
        ("llama", "self_attn.o_proj.weight", "o has the value (nan|inf) in row 11"),
        ("llama", "mlp.up_proj.weight", "up has the value (nan|inf) in column 3"),
        ("llama", "mlp.down_proj.weight", "down has the value (nan|inf) in column 3"),
        ("mixtral", "mlp.experts.down_proj", "down of expert 2 has the value (nan|inf) in row 11"),
        (
            "qwen2_moe",
            "mlp.shared_expert.gate_proj.weight",
            "shared expert: gate has the value (nan|inf) in row 11",
        ),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    family: str, weight: str, named: str, value: float
) -> None:
    base = base_of(family)
    peaks = find_peaks(base, TEXTS, block_size=16)
    values = base.module.model.layers[1].get_parameter(weight).data
    (values[2] if values.dim() == 3 else values)[11, 3] = value
    with pytest.raises(UnsupportedModel, match=f"{family}, layer 1[:,] {named}; expected finite"):
        list(Int8Parts(base, peaks).take_layers())


def test_peaks_are_the_largest_inputs_of_all_texts() -> None:
    base = base_of()
    seen = find_peaks(base, TEXTS, block_size=16)
    reference = _Watching(Parts(base_of()))
    for text in TEXTS:
        reference.logits(text)
    layers = base.module.model.layers
    assert [len(peaks.attention) for peaks in seen] == [64] * len(layers)
    for peaks, of_layer in zip(seen, reference.layers(), strict=True):
        assert peaks.mlp is not None
        assert peaks.down is not None
        torch.testing.assert_close(peaks.attention, of_layer[0])
        torch.testing.assert_close(peaks.mlp, of_layer[1])
        torch.testing.assert_close(peaks.down, of_layer[2])
    hooks = [part._forward_pre_hooks for part in base.module.modules()]
    assert not any(hooks), "a module with a hook is not of an exact family"


class _Watching(Reference):
    """Keeps the largest inputs of the products of each layer."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._peaks: dict[int, torch.Tensor] = {}

    def _product(self, inputs, linear):
        peaks = inputs.abs().amax(0).float()
        key = id(linear)
        before = self._peaks.get(key, peaks)
        self._peaks[key] = torch.maximum(before, peaks)
        return super()._product(inputs, linear)

    def layers(self):
        for layer in self._layers:
            assert isinstance(layer.mlp, Dense)
            watched = (layer.q, layer.mlp.gate, layer.mlp.down)
            yield [self._peaks[id(linear)] for linear in watched]


def test_experts_are_not_smoothed() -> None:
    base = base_of("qwen2_moe")
    norms = [layer.post_attention_layernorm.weight.clone() for layer in base.module.model.layers]
    peaks = find_peaks(base, TEXTS, block_size=16)
    assert {(each.mlp, each.down) for each in peaks} == {(None, None)}
    layers = list(Int8Parts(base, peaks).take_layers())
    for layer, norm in zip(layers, norms, strict=True):
        assert torch.equal(layer.post_norm, norm)


def test_inputs_that_overflow_are_named() -> None:
    base = base_of()
    base.module.model.layers[1].input_layernorm.weight.data[3] = 3e38
    with pytest.raises(UnsupportedModel, match=r"llama, layer 1: the inputs of q reach (inf|nan)"):
        find_peaks(base, TEXTS, block_size=16)


def test_texts_become_tokens_with_any_tokenizer() -> None:
    base = biased_base()
    for texts in (CALIBRATION, EVALUATION):
        tokens = tokens_of(base, texts)
        assert [len(ids) for ids in tokens] == [128] * len(texts)  # bytes
        assert all(0 <= token_id < base.num_logits for ids in tokens for token_id in ids)
        assert len({tuple(ids) for ids in tokens}) == len(texts)
        assert base.tokenizer.decode(tokens[0]) == texts[0][:128]
    assert not set(CALIBRATION) & set(EVALUATION)
    few = replace(base, num_logits=40, context=20)  # ids of most letters have no logit
    assert [len(ids) for ids in tokens_of(few, EVALUATION)] == [20] * len(EVALUATION)
    assert max(max(ids) for ids in tokens_of(few, EVALUATION)) < 40
    without = prepare_base(family_model("llama"), None, name="m", dtype="float32", device="cpu")
    assert [len(ids) for ids in tokens_of(without, CALIBRATION)] == [128] * len(CALIBRATION)
