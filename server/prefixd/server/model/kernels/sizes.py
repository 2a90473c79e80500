"""Sizes of the attention kernels that are the same for every step, and the models they fit.

They decide in which order a row's scores are summed: a row has the same bits in any step only
because none of them depends on the step.
"""

import torch

SPLIT_LENGTH = 256
"""Positions that one program of a decode row reads. One row of 4,096 positions and 8 KV heads makes
128 programs, about one for each multiprocessor of an H100."""

MIN_SHARED = 256
"""The fewest positions of a prefix that are split off and read once for all rows under it."""

TILE_HEIGHT = 32
"""Query rows, each one head of one sequence, that one load of a shared prefix serves. Twice as many
would load it half as often, from the L2 cache mostly, but compute twice as much for a row alone."""

MAX_HEAD_DIM = 128

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def members_per_tile(group: int) -> int:
    """The most rows in one tile of a shared prefix; ``group`` is the number of query heads for each
    KV head."""
    return TILE_HEIGHT // group


def require_supported(
    *, head_dim: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    """Raises ValueError for attention that the kernels do not compute."""
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"heads of size {head_dim}; expected a multiple of 16 up to {MAX_HEAD_DIM}"
        )
    if num_heads % num_kv_heads or num_heads // num_kv_heads > TILE_HEIGHT:
        raise ValueError(
            f"{num_heads} query heads for {num_kv_heads} KV heads; expected a multiple, at most "
            f"{TILE_HEIGHT} for each"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype}; expected float32, float16 or bfloat16")
