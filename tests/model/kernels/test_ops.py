"""The operators on a CPU and on fake tensors, and what they refuse."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from prefixd.server.model import kernels
from prefixd.server.model.kernels import RaggedRows
from tests.model.kernels.steps import SCALE, Case, Sizes, expected, int32, lay_out

MIXED = (
    *(Case(300, shared=256, prefix=1, seed=1), Case(17, 5, seed=2), Case(0, seed=3)),
    *(Case(273, shared=256, prefix=1, seed=4), Case(16, seed=5), Case(40, 9, seed=6)),
)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_attention_on_a_cpu_is_that_of_the_module(group: int) -> None:
    step = lay_out(MIXED, Sizes(group=group))
    out = kernels.attend(
        step.queries,
        step.kv,
        step.rows,
        scale=SCALE,
        max_queries=step.max_queries,
        max_length=step.max_length,
    )
    torch.testing.assert_close(out, expected(step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_heads_turn_as_in_transformers_and_are_stored(normed: bool) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    torch.manual_seed(0)
    heads, kv_heads, head_dim, tokens = 6, 2, 64, 7
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim)
    angles = torch.rand(20, head_dim // 2)
    positions, slots = torch.randperm(20)[:tokens], torch.randperm(3 * 16)[:tokens]
    norms = [Qwen3RMSNorm(head_dim, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    kv = torch.zeros(2, 3, 16, kv_heads, head_dim)
    with torch.inference_mode():
        queries = kernels.rotate_and_write(
            kv,
            qkv,
            positions.int(),
            slots.int(),
            cosine=angles.cos(),
            sine=angles.sin(),
            q_norm=norms[0].weight if normed else None,
            k_norm=norms[1].weight if normed else None,
            eps=1e-6,
        )
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        if normed:
            q, k = norms[0](q), norms[1](k)
        table = torch.cat([angles, angles], -1)[positions]
        q, k = apply_rotary_pos_emb(q, k, table.cos(), table.sin(), unsqueeze_dim=1)
    torch.testing.assert_close(queries, q)
    stored = kv.view(2, -1, kv_heads, head_dim)
    torch.testing.assert_close(stored[:, slots], torch.stack([k, v]))
    assert stored.any(-1).any(-1).sum() == 2 * tokens


def test_keys_and_values_are_stored_at_their_slots() -> None:
    kv = torch.zeros(2, 3, 4, 2, 16)
    keys, values = torch.randn(2, 3, 2, 16)
    kernels.write_kv(kv, keys, values, int32([11, 4, 6]))
    assert torch.equal(kv.view(2, 12, 2, 16)[:, [11, 4, 6]], torch.stack([keys, values]))
    assert torch.count_nonzero(kv) == keys.numel() + values.numel()


def test_add_and_norm_and_gate_are_those_of_torch() -> None:
    torch.manual_seed(0)
    hidden, residual, weight = torch.randn(3, 48), torch.randn(3, 48), torch.randn(48)
    normed, total = kernels.add_rms_norm(hidden, residual, weight, 1e-5)
    assert torch.equal(total, hidden + residual)
    torch.testing.assert_close(normed, functional.rms_norm(total, (48,), weight, 1e-5))
    gate, up = hidden.chunk(2, -1)
    torch.testing.assert_close(kernels.silu_and_mul(hidden), functional.silu(gate) * up)


def test_operators_have_fakes_for_cuda() -> None:
    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    step = lay_out(MIXED, Sizes())
    with FakeTensorMode():
        queries, kv, rows = like(step.queries), like(step.kv), RaggedRows(*map(like, step.rows))
        attended = kernels.attend(queries, kv, rows, scale=SCALE, max_queries=9, max_length=300)
        assert (attended.device.type, attended.shape) == ("cuda", queries.shape)
        num_tokens = len(queries)
        qkv = torch.empty(num_tokens, 8, 64, device="cuda")
        index = torch.empty(num_tokens, dtype=torch.int32, device="cuda")
        table = torch.empty(512, 32, device="cuda")
        rotated = kernels.rotate_and_write(
            kv, qkv, index, index, cosine=table, sine=table, q_norm=None, k_norm=None, eps=1e-6
        )
        assert rotated.shape == queries.shape
        keys, values, _ = torch.split(qkv, [2, 2, 4], 1)
        kernels.write_kv(kv, keys, values, index)
        hidden, weight = torch.empty(num_tokens, 48, device="cuda"), torch.empty(48, device="cuda")
        normed, total = kernels.add_rms_norm(hidden, hidden, weight, 1e-6)
        assert normed.shape == total.shape == hidden.shape
        assert kernels.silu_and_mul(hidden).shape == (num_tokens, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 256}, "heads of size 256; expected a multiple of 16 up to 128"),
        ({"head_dim": 72}, "heads of size 72"),
        ({"num_heads": 9}, "9 query heads for 2 KV heads"),
        ({"num_heads": 256}, "at most 32 for each"),
        ({"dtype": torch.float64}, "expected float32, float16 or bfloat16"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_unsupported_attention_is_refused(changes: dict[str, object], message: str) -> None:
    sizes = {"head_dim": 64, "num_heads": 8, "num_kv_heads": 2, "dtype": torch.float32}
    kernels.require_supported(**sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        kernels.require_supported(**(sizes | changes))  # type: ignore[arg-type]


def test_operators_on_a_cpu_do_not_import_triton() -> None:
    program = (
        "import sys, torch; from prefixd.server.model import kernels;"
        "kernels.silu_and_mul(torch.zeros(2, 4)); sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
