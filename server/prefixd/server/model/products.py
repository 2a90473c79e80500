"""Matrix products with weights that are packed once, where torch can: on a CPU."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.nn import functional

from prefixd.server.model.parts import Linear

Product = Callable[[torch.Tensor], torch.Tensor]
"""[n, in] to [n, out]."""

_TYPICAL_ROWS = 32
"""Rows for which oneDNN chooses the layout."""


def merged(linears: Sequence[Linear]) -> Linear:
    """Several weights of the same inputs as one, one above another."""
    if len(linears) == 1:
        return Linear(linears[0].weight.contiguous(), linears[0].bias)
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return Linear(weight)
    biases = [
        weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return Linear(weight, torch.cat(biases))


def product_of(linears: Sequence[Linear]) -> Product:
    """The product with several weights of the same inputs, one above another."""
    linear = merged(linears)
    weight, bias = linear.weight, linear.bias
    if weight.device.type == "cpu" and packs(weight.dtype):
        return _packed(weight, bias)
    return lambda rows: functional.linear(rows, weight, bias)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, _TYPICAL_ROWS)  # noqa: SLF001
    multiply = ops._linear_pointwise  # noqa: SLF001 - torch has no public one
    return lambda rows: multiply(rows, packed, bias, "none", [], "")


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of ``dtype``: its operations for it are private, and may
    change."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    bias, rows = weight[:, 0].contiguous(), weight[:5]
    try:
        with torch.inference_mode():
            product = _packed(weight, bias)(rows)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    expected = functional.linear(rows.float(), weight.float(), bias.float())
    tolerance = 32 * torch.finfo(dtype).eps
    return torch.allclose(product.float(), expected, rtol=tolerance, atol=tolerance)
