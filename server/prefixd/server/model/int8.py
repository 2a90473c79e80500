"""Rounding of an exact family's layers to int8: a scale for each output row, after smoothing.

Inputs are rounded in each pass with one scale for a token, so a channel much larger than the others
leaves these few of the 255 steps. Smoothing moves such sizes into the weights, which have their
scales by row: SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 4) with alpha 0.5, so that
a channel's input and its weights share the range evenly. Factors are powers of two: dividing the
norm before a product, or the rows of ``up`` before ``down``, then rounds nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.parts import Dense, Experts, Layer, Linear, Parts

LARGEST = 127
"""The largest code; -128 is not used, so that negating a weight negates its code."""

_FLOOR = 2.0**-10
"""Peaks below this part of the largest one count as this part. A channel that the calibration text
never reached may be large in another text, and its factor must not be extreme."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The largest |x| of each input channel of a layer's products, in float32: of q, k and v
    [width], of gate and up [width], of down [inner]. The last two are None where the layer has
    experts: not all see enough of a short text."""

    attention: torch.Tensor
    mlp: torch.Tensor | None
    down: torch.Tensor | None


class Int8Parts(Parts):
    """Parts whose layers are smoothed and rounded one by one, as they are taken."""

    def __init__(self, base: LoadedBase, peaks: Sequence[Peaks]) -> None:
        """``peaks`` of every layer. Raises NotExact."""
        super().__init__(base)
        self._peaks = peaks

    def take_layers(self) -> Iterator[Layer]:
        """All layers in order, rounded. Raises UnsupportedModel for values that are not finite."""
        for index, (layer, peaks) in enumerate(
            zip(super().take_layers(), self._peaks, strict=True)
        ):
            name = f"{self.base.name}, layer {index}"
            yield round_layer(smooth(layer, peaks, name=name), name=name)


@torch.inference_mode()
def smooth(layer: Layer, peaks: Peaks, *, name: str) -> Layer:
    """The same function with smaller differences between the channels of each product's input, the
    weights in float32. Raises UnsupportedModel, as ``round_layer`` does."""
    factors = _factors(
        peaks.attention,
        _column_peaks(layer.q, f"{name}: q"),
        _column_peaks(layer.k, f"{name}: k"),
        _column_peaks(layer.v, f"{name}: v"),
    )
    layer = replace(
        layer,
        input_norm=_divided(layer.input_norm, factors),
        q=_wider(layer.q, factors),
        k=_wider(layer.k, factors),
        v=_wider(layer.v, factors),
    )
    if not isinstance(layer.mlp, Dense) or peaks.mlp is None or peaks.down is None:
        return layer
    mlp = layer.mlp
    factors = _factors(
        peaks.mlp,
        _column_peaks(mlp.gate, f"{name}: gate"),
        _column_peaks(mlp.up, f"{name}: up"),
    )
    inner = _factors(peaks.down, _column_peaks(mlp.down, f"{name}: down"))
    up = _wider(mlp.up, factors)
    return replace(
        layer,
        post_norm=_divided(layer.post_norm, factors),
        mlp=Dense(
            gate=_wider(mlp.gate, factors),
            up=Linear(
                up.weight / inner[:, None], None if up.bias is None else _divided(up.bias, inner)
            ),
            down=_wider(mlp.down, inner),
        ),
    )


def _column_peaks(linear: Linear, name: str) -> torch.Tensor:
    """The largest |w| of each input channel [in], float32."""
    peaks = linear.weight.abs().amax(0).float()
    _require_finite(peaks, name, "column")
    return peaks


def _factors(inputs: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """Powers of two near sqrt(max|x| / max|w|) of each input channel [in], float32."""
    exponents = (_log2(inputs) - _log2(torch.stack(columns).amax(0))) / 2
    return exponents.round().exp2()


def _log2(peaks: torch.Tensor) -> torch.Tensor:
    largest = peaks.amax()
    if largest == 0:  # nothing to share
        return torch.zeros_like(peaks)
    return peaks.clamp_min(largest * _FLOOR).log2()


def _divided(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """In the dtype of ``values``, where a power of two changes the exponent alone."""
    return (values.float() / factors).to(values.dtype)


def _wider(linear: Linear, factors: torch.Tensor) -> Linear:
    """``linear`` for inputs that were divided by ``factors`` [in]."""
    return Linear(linear.weight.float() * factors, linear.bias)


@torch.inference_mode()
def round_layer(layer: Layer, *, name: str) -> Layer:
    """Round the weights of all products; norms, biases and the router of experts stay. Raises
    UnsupportedModel, with ``name`` and the weight, for values that are not finite."""
    mlp = layer.mlp
    return replace(
        layer,
        q=_rounded(layer.q, f"{name}: q"),
        k=_rounded(layer.k, f"{name}: k"),
        v=_rounded(layer.v, f"{name}: v"),
        o=_rounded(layer.o, f"{name}: o"),
        mlp=_rounded_dense(mlp, name) if isinstance(mlp, Dense) else _rounded_experts(mlp, name),
    )


def _rounded_dense(dense: Dense, name: str) -> Dense:
    return Dense(
        gate=_rounded(dense.gate, f"{name}: gate"),
        up=_rounded(dense.up, f"{name}: up"),
        down=_rounded(dense.down, f"{name}: down"),
    )


def _rounded_experts(experts: Experts, name: str) -> Experts:
    gate_up, gate_up_scales = _rounded_stack(experts.gate_up, f"{name}: gate_up")
    down, down_scales = _rounded_stack(experts.down, f"{name}: down")
    shared = experts.shared
    return replace(
        experts,
        gate_up=gate_up,
        gate_up_scales=gate_up_scales,
        down=down,
        down_scales=down_scales,
        shared=None if shared is None else _rounded_dense(shared, f"{name}, shared expert"),
    )


def _rounded_stack(weights: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [experts, out, in] and scales [experts, out], made expert by expert: the float32 values
    of all would take four times their room."""
    codes = torch.empty(weights.shape, dtype=torch.int8)
    scales = torch.empty(weights.shape[:2])
    for index, weight in enumerate(weights):
        codes[index], scales[index] = round_rows(weight, f"{name} of expert {index}")
    return codes, scales


def _rounded(linear: Linear, name: str) -> Linear:
    codes, scales = round_rows(linear.weight, name)
    return Linear(codes, linear.bias, scales)


def round_rows(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] of int8 and scales [out] of float32 with weight = codes * scales of their
    row, but for rounding. Raises UnsupportedModel for values that are not finite."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    _require_finite(largest, name, "row")
    # A row of zeros, or so small that its scale would be 0, has the codes 0.
    scales = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (weight / scales[:, None]).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def _require_finite(peaks: torch.Tensor, name: str, place: str) -> None:
    """Raise UnsupportedModel unless all values are finite; the peak of a row with NaN is NaN."""
    wrong = (~peaks.isfinite()).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise UnsupportedModel(
            f"{name} has the value {float(peaks[index])} in {place} {index}; expected finite ones"
        )
