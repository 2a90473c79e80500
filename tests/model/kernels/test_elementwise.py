"""The kernels that treat tokens one by one equal their references."""

import pytest
import torch

from prefixd.server.model.kernels import reference
from tests.model.kernels.interpreter import DEVICE, Launcher

TOLERANCES = {"float32": 1e-5, "float16": 2e-3} | ({} if DEVICE == "cpu" else {"bfloat16": 2e-2})
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(getattr(torch, name), tolerance) for name, tolerance in TOLERANCES.items()],
    ids=TOLERANCES.keys(),
)


@DTYPES
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "normed"),
    [(6, 64, True), (6, 128, True), (6, 128, False), (3, 96, True), (9, 64, False)],
)
def test_rotate_and_write(
    kernels: Launcher,
    *,
    dtype: torch.dtype,
    tolerance: float,
    num_heads: int,
    head_dim: int,
    normed: bool,
) -> None:
    torch.manual_seed(0)
    kv_heads = 3 if num_heads % 2 else 2
    qkv = torch.randn(5, num_heads + 2 * kv_heads, head_dim).to(dtype)
    angles = torch.rand(40, head_dim // 2) * 6
    norms = (torch.randn(2, head_dim) + 1).to(dtype) if normed else (None, None)
    options = {"cosine": angles.cos(), "sine": angles.sin(), "eps": 1e-5}
    options |= {"q_norm": norms[0], "k_norm": norms[1]}
    positions, slots = torch.tensor([[0, 39, 7, 8, 9], [3, 23, 0, 17, 5]], dtype=torch.int32)
    kv = torch.full((2, 3, 8, kv_heads, head_dim), 7.0, dtype=dtype)
    written = kv.clone()
    queries = kernels.launch("rotate_and_write", kv, qkv, positions, slots, **options)
    right = reference.rotate_and_write(written, qkv, positions, slots, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(queries, right, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kv, written, rtol=tolerance, atol=tolerance)
    assert torch.equal(kv[1], written[1])  # values are copied


@DTYPES
def test_write(kernels: Launcher, dtype: torch.dtype, tolerance: float) -> None:
    qkv = torch.randn(3, 9, 16).to(dtype)
    slots = torch.tensor([11, 4, 6], dtype=torch.int32)
    kv = torch.zeros(2, 3, 4, 3, 16, dtype=dtype)
    written = kv.clone()
    # Parts of a wider tensor: the tokens are not contiguous.
    kernels.launch("write_kv", kv, qkv[:, 3:6], qkv[:, 6:], slots)
    reference.write_kv(written, qkv[:, 3:6], qkv[:, 6:], slots)
    assert torch.equal(kv, written)


@DTYPES
@pytest.mark.parametrize("width", [48, 1024])
def test_add_rms_norm(kernels: Launcher, dtype: torch.dtype, tolerance: float, width: int) -> None:
    torch.manual_seed(0)
    hidden, residual, weight = torch.randn(3, 4, width).to(dtype).unbind(0)
    normed, total = kernels.launch("add_rms_norm", hidden, residual, weight[0], 1e-5)
    right, right_total = reference.add_rms_norm(hidden, residual, weight[0], 1e-5)
    assert torch.equal(total, right_total)
    torch.testing.assert_close(normed, right, rtol=tolerance, atol=tolerance)


@DTYPES
def test_silu_and_mul(kernels: Launcher, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(3, 2 * 1100).to(dtype)  # more than one program, the last not full
    right = reference.silu_and_mul(gate_up)
    out = kernels.launch("silu_and_mul", gate_up)
    torch.testing.assert_close(out, right, rtol=tolerance, atol=tolerance)
