"""The operators in plain torch, for a CPU. Tests compare the kernels with them."""

import torch
from torch.nn.functional import silu


def write_kv(
    kv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """As ``prefixd::write_kv``."""
    by_slot = kv.view(2, -1, *kv.shape[3:])
    by_slot[0].index_copy_(0, slots.long(), keys)
    by_slot[1].index_copy_(0, slots.long(), values)


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
    """As ``prefixd::rotate_and_write``."""
    kv_heads = kv.shape[3]
    sizes = [qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
    queries, keys, values = torch.split(qkv, sizes, 1)
    turn = cosine[positions.long(), None], sine[positions.long(), None]  # [T, 1, head_dim / 2]
    write_kv(kv, _rotated(keys, k_norm, turn, eps), values, slots)
    return _rotated(queries, q_norm, turn, eps)


def _rotated(
    heads: torch.Tensor,
    norm: torch.Tensor | None,
    turn: tuple[torch.Tensor, torch.Tensor],
    eps: float,
) -> torch.Tensor:
    wide = heads.float()
    if norm is not None:
        wide = wide * _inverse_rms(wide, eps) * norm.float()
    first, second = wide.chunk(2, -1)
    cosine, sine = turn
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    return rotated.to(heads.dtype)


def attend(
    queries: torch.Tensor,
    kv: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    *_tiles: torch.Tensor,
    scale: float,
    **_bounds: int,
) -> torch.Tensor:
    """As ``prefixd::attend``, in float32: each row by itself, so no tiles and no bounds."""
    _, _, block_size, kv_heads, head_dim = kv.shape
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    starts = query_starts.tolist()
    for row, length in enumerate(lengths.tolist()):
        first, last = starts[row], starts[row + 1]
        if not length or first == last:
            continue
        blocks = block_table[row, : -(-length // block_size)].long()
        # [2, kv_heads, length, head_dim]
        keys, values = (
            kv[:, blocks].view(2, -1, kv_heads, head_dim)[:, :length].transpose(1, 2).float()
        )
        # [kv_heads, heads per KV head, queries, head_dim]
        query = queries[first:last].float().view(last - first, kv_heads, -1, head_dim)
        query = query.permute(1, 2, 0, 3)
        scores = query @ keys[:, None].transpose(2, 3) * scale
        sees = torch.arange(length - (last - first), length)[:, None] >= torch.arange(length)
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        attended = (weights @ values[:, None]).permute(2, 0, 1, 3)
        out[first:last] = attended.reshape(last - first, -1, head_dim)
    return out


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``prefixd::add_rms_norm``."""
    total = hidden + residual
    wide = total.float()
    return (wide * _inverse_rms(wide, eps) * weight.float()).to(hidden.dtype), total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As ``prefixd::silu_and_mul``."""
    gate, up = gate_up.float().chunk(2, -1)
    return (silu(gate) * up).to(gate_up.dtype)


def _inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
