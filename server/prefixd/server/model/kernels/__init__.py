"""Kernels of the decoder as torch operators: Triton on CUDA, plain torch on a CPU.

All index tensors are int32 on the device of the data, and no shape depends on data: a step of the
same sizes can be captured into a CUDA graph. Triton is imported with the first launch.
"""

from prefixd.server.model.kernels.ops import (
    RaggedRows,
    add_rms_norm,
    attend,
    rotate_and_write,
    silu_and_mul,
    write_kv,
)
from prefixd.server.model.kernels.sizes import (
    MIN_SHARED,
    SPLIT_LENGTH,
    members_per_tile,
    require_supported,
)

__all__ = [
    "MIN_SHARED",
    "SPLIT_LENGTH",
    "RaggedRows",
    "add_rms_norm",
    "attend",
    "members_per_tile",
    "require_supported",
    "rotate_and_write",
    "silu_and_mul",
    "write_kv",
]
