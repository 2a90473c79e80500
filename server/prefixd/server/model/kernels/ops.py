"""The operators ``prefixd::…``: one signature each, for CUDA, for a CPU and for fake tensors.

``kv`` is one layer's part of the KV pool, [2, blocks, block, kv_heads, head_dim], contiguous: keys,
then values. Slot ``block * block_size + offset`` holds one position.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from prefixd.server.model.kernels import reference
from prefixd.server.model.kernels.sizes import require_supported


class RaggedRows(NamedTuple):
    """Which queries attend which positions, as int32 tensors.

    Row r has the flat tokens ``query_starts[r] .. query_starts[r + 1]`` ([R + 1]), which are the
    last of its ``lengths[r]`` positions in the blocks ``block_table[r]`` ([R, max_blocks]). A row
    of length 0 is padding: nothing is read for it, and its output has no meaning.

    ``shared`` [R] counts the leading positions that rows have in common: 0, or a multiple of the
    block size that is at least MIN_SHARED and less than the length. They are read once for each of
    ``tiles`` [N, 2], (first, count): the rows ``members[first : first + count]``, at most
    members_per_tile, which have the same leading blocks. ``members`` is [R]; every row with one
    query and shared positions is in exactly one tile. A count of 0 is padding.
    """

    query_starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    shared: torch.Tensor
    members: torch.Tensor
    tiles: torch.Tensor


def write_kv(
    kv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store keys and values, each [T, kv_heads, head_dim], at ``slots`` [T]."""
    torch.ops.prefixd.write_kv(kv, keys, values, slots)


def rotate_and_write(
    kv: torch.Tensor,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values at ``slots`` [T]; returns the queries
    [T, heads, head_dim].

    ``qkv`` is [T, heads + 2 * kv_heads, head_dim]: queries, keys, values. ``cosine`` and ``sine``
    [context, head_dim / 2] are float32 tables, indexed by ``positions`` [T]; the first half of a
    head turns with the second, as in Llama. With ``q_norm`` and ``k_norm`` [head_dim] each head is
    divided by its root mean square first, as in Qwen3. Computed in float32, rounded once.
    """
    queries: torch.Tensor = torch.ops.prefixd.rotate_and_write(
        kv,
        qkv,
        positions,
        slots,
        cosine=cosine,
        sine=sine,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
    return queries


def attend(
    queries: torch.Tensor,
    kv: torch.Tensor,
    rows: RaggedRows,
    *,
    scale: float,
    max_queries: int,
    max_length: int,
) -> torch.Tensor:
    """Causal attention of ragged rows; returns the shape of ``queries`` [T, heads, head_dim].

    ``max_queries`` bounds the queries of a row: with 1 every row decodes. ``max_length`` bounds
    ``lengths``. A row's output has the same bits regardless of what else is in the step.
    """
    attended: torch.Tensor = torch.ops.prefixd.attend(
        queries, kv, *rows, scale=scale, max_queries=max_queries, max_length=max_length
    )
    return attended


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + residual, each [T, width], divided by its root mean square, times ``weight``
    [width]; returns that and the sum."""
    normed, total = torch.ops.prefixd.add_rms_norm(hidden, residual, weight, eps)
    return normed, total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of ``gate_up`` [T, 2 * inner]; returns [T, inner]."""
    gated: torch.Tensor = torch.ops.prefixd.silu_and_mul(gate_up)
    return gated


_SCHEMAS = (
    "write_kv(Tensor(a!) kv, Tensor keys, Tensor values, Tensor slots) -> ()",
    """rotate_and_write(Tensor(a!) kv, Tensor qkv, Tensor positions, Tensor slots, *, Tensor cosine,
    Tensor sine, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor""",
    """attend(Tensor queries, Tensor kv, Tensor query_starts, Tensor lengths, Tensor block_table,
    Tensor shared, Tensor members, Tensor tiles, *, float scale, SymInt max_queries,
    SymInt max_length) -> Tensor""",
    "add_rms_norm(Tensor hidden, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "silu_and_mul(Tensor gate_up) -> Tensor",
)


def _fake_write_kv(kv: torch.Tensor, keys: torch.Tensor, *_: Any) -> None:
    _require_heads(kv, keys.shape[1], keys.dtype)


def _fake_rotate_and_write(kv: torch.Tensor, qkv: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    num_heads = qkv.shape[1] - 2 * kv.shape[3]
    _require_heads(kv, num_heads, qkv.dtype)
    return qkv.new_empty((qkv.shape[0], num_heads, qkv.shape[2]))


def _fake_attend(queries: torch.Tensor, kv: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    _require_heads(kv, queries.shape[1], queries.dtype)
    return queries.new_empty(queries.shape)


def _fake_add_rms_norm(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


def _fake_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _require_heads(kv: torch.Tensor, num_heads: int, dtype: torch.dtype) -> None:
    """Fakes refuse what the kernels refuse."""
    require_supported(
        head_dim=kv.shape[4], num_heads=num_heads, num_kv_heads=kv.shape[3], dtype=dtype
    )


def _launched(name: str) -> Callable[..., Any]:
    """The launch of a kernel. Its import needs Triton, which torch's builds for CUDA bring."""

    def launch_kernel(*tensors: Any, **options: Any) -> Any:
        module = import_module("prefixd.server.model.kernels.launch")
        return getattr(module, name)(*tensors, **options)

    return launch_kernel


_LIBRARY: Any = torch.library.Library("prefixd", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _name = _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, getattr(reference, _name), "CPU")
    _LIBRARY.impl(_name, _launched(_name), "CUDA")
    torch.library.register_fake(f"prefixd::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)
