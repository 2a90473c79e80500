"""Launches of the Triton kernels, with the grids and sizes that they serve with.

Grids depend on the sizes of tensors and on the two bounds of ``attend`` alone, and results and
scratch come from torch's allocator: all of it can be captured into a CUDA graph.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from prefixd.server.model.kernels import decode, elementwise, prefill
from prefixd.server.model.kernels.ops import RaggedRows
from prefixd.server.model.kernels.sizes import SPLIT_LENGTH, TILE_HEIGHT, require_supported

SHORT_TILE = 16
"""Query rows of a tile that belongs to one decode row: the fewest that tensor cores multiply."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of ``height`` query rows, ``positions`` loaded at a time, by ``warps`` that have at
    most ``registers`` a thread (None: as many as the compiler takes)."""

    height: int
    positions: int
    warps: int
    registers: int | None = None


def prefill_tile(dtype: torch.dtype, capability: int) -> Tile:
    """The tile of a prefill: larger ones load KV less often, these spill no registers."""
    if dtype.itemsize != 2:  # for the self-check
        return Tile(height=64, positions=32, warps=8)
    if capability >= 90:
        return Tile(height=128, positions=64, warps=8, registers=168)
    return Tile(height=64, positions=32, warps=8, registers=168)


@cache
def capability_of(device: torch.device) -> int:
    """Compute capability times ten, 90 for an H100; 0 for what is no CUDA device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def write_kv(
    kv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """As ``prefixd::write_kv``; the heads of a token are contiguous."""
    _require(kv, keys.shape[1], keys)
    width = kv.shape[3] * kv.shape[4]
    stored_keys, stored_values = kv.unbind(0)
    elementwise.write[(len(slots),)](
        stored_keys,
        stored_values,
        keys,
        values,
        slots,
        keys.stride(0),
        values.stride(0),
        WIDTH=width,
        SIZE=triton.next_power_of_2(width),
        num_warps=4,
    )


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
    """As ``prefixd::rotate_and_write``; the heads of a token are contiguous."""
    num_tokens, num_all, head_dim = qkv.shape
    kv_heads = kv.shape[3]
    num_heads = num_all - 2 * kv_heads
    _require(kv, num_heads, qkv)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("a norm of queries or keys alone; expected both or none")
    queries = qkv.new_empty((num_tokens, num_heads, head_dim))
    at_once = 4
    elementwise.rotate[(triton.cdiv(num_all, at_once), num_tokens)](
        queries,
        *kv.unbind(0),
        qkv,
        positions,
        slots,
        cosine,
        sine,
        q_norm,
        k_norm,
        qkv.stride(0),
        eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        AT_ONCE=at_once,
        NORMED=q_norm is not None,
        num_warps=1,
    )
    return queries


def attend(
    queries: torch.Tensor,
    kv: torch.Tensor,
    *rows: torch.Tensor,
    scale: float,
    max_queries: int,
    max_length: int,
    split_length: int = SPLIT_LENGTH,
) -> torch.Tensor:
    """As ``prefixd::attend``; tests have shorter splits."""
    _require(kv, queries.shape[1], queries)
    queries = queries.contiguous()
    out = torch.empty_like(queries)
    call = _Attention(out, queries, kv, RaggedRows(*rows), scale * math.log2(math.e))
    call.decode(split_length, max_length)
    if max_queries > 1:
        call.prefill()
    return out


class _Attention:
    """The launches of one call. ``scale`` is for scores as powers of 2."""

    def __init__(
        self,
        out: torch.Tensor,
        queries: torch.Tensor,
        kv: torch.Tensor,
        rows: RaggedRows,
        scale: float,
    ) -> None:
        self._out, self._queries, self._rows, self._scale = out, queries, rows, scale
        self._keys, self._values = kv.unbind(0)
        self._kv_heads, self._head_dim = kv.shape[3:]
        self._group = queries.shape[1] // self._kv_heads
        self._sizes = {
            "D": triton.next_power_of_2(self._head_dim),
            "HEAD_DIM": self._head_dim,
            "KV_HEADS": self._kv_heads,
            "GROUP": self._group,
            "BLOCK": kv.shape[2],
            "STAGES": 3,
        }

    def decode(self, split_length: int, max_length: int) -> None:
        """Rows of one query, and zeros for rows of padding."""
        rows, num_heads = self._rows, self._queries.shape[1]
        num_rows, num_splits = len(rows.lengths), triton.cdiv(max_length, split_length)
        # One more where a shared prefix ends within a split.
        scratch = (num_rows, num_splits + 1, num_heads)
        partials = self._queries.new_empty((*scratch, self._head_dim), dtype=torch.float32)
        powers = self._queries.new_empty(scratch, dtype=torch.float32)
        tensors = (self._queries, self._keys, self._values, partials, powers)
        index = (rows.query_starts, rows.lengths, rows.block_table, rows.shared)
        counts = (rows.block_table.stride(0), num_splits + 1)
        if len(rows.tiles):
            decode.decode_shared_prefix[(self._kv_heads, num_splits, len(rows.tiles))](
                *(*tensors, *index, rows.members, rows.tiles, *counts, self._scale),
                SPLIT=split_length,
                M=TILE_HEIGHT,
                N=32,
                num_warps=4,
                **self._sizes,
            )
        decode.decode_own_positions[(self._kv_heads, num_splits, num_rows)](
            *(*tensors, *index, *counts, self._scale),
            SPLIT=split_length,
            M=max(SHORT_TILE, triton.next_power_of_2(self._group)),
            N=64 if self._queries.dtype.itemsize == 2 else 32,
            num_warps=4,
            **self._sizes,
        )
        decode.combine[(num_heads, num_rows)](
            *(self._out, partials, powers),
            *(rows.query_starts, rows.lengths, rows.shared, num_splits + 1),
            SPLIT=split_length,
            D=self._sizes["D"],
            HEAD_DIM=self._head_dim,
            HEADS=num_heads,
            AT_ONCE=16,
            num_warps=4,
        )

    def prefill(self) -> None:
        """Rows of several queries."""
        rows = self._rows
        tile = prefill_tile(self._queries.dtype, capability_of(self._queries.device))
        bound = {} if tile.registers is None else {"maxnreg": tile.registers}
        num_rows, tall = len(rows.lengths), tile.height // self._group
        prefill.prefill_tiles[(self._kv_heads, len(self._queries) // tall + num_rows)](
            *(self._out, self._queries, self._keys, self._values),
            *(rows.query_starts, rows.lengths, rows.block_table),
            *(num_rows, rows.block_table.stride(0), self._scale),
            M=tile.height,
            N=tile.positions,
            num_warps=tile.warps,
            **bound,
            **self._sizes,
        )


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``prefixd::add_rms_norm``."""
    hidden, residual = hidden.contiguous(), residual.contiguous()
    normed, total = torch.empty_like(hidden), torch.empty_like(hidden)
    width = hidden.shape[1]
    elementwise.add_norm[(len(hidden),)](
        normed,
        total,
        hidden,
        residual,
        weight,
        width,
        eps,
        SIZE=triton.next_power_of_2(width),
        num_warps=8,
    )
    return normed, total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As ``prefixd::silu_and_mul``."""
    gate_up = gate_up.contiguous()
    num_tokens, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((num_tokens, inner))
    size = 1024
    elementwise.gate[(triton.cdiv(inner, size), num_tokens)](
        out, gate_up, inner, SIZE=size, num_warps=4
    )
    return out


def _require(kv: torch.Tensor, num_heads: int, given: torch.Tensor) -> None:
    require_supported(
        head_dim=kv.shape[4], num_heads=num_heads, num_kv_heads=kv.shape[3], dtype=kv.dtype
    )
    if given.dtype != kv.dtype:
        raise ValueError(f"{given.dtype} for a KV pool in {kv.dtype}; expected the same")
