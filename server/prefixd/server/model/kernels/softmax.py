"""The loop over block tables that all attention kernels have in common, in Triton.

The heads of one KV head are rows of a query tile of fixed height, of which unused rows are computed
and dropped: no row's bits depend on others. Positions at or past the end are never loaded.
"""

import triton
import triton.language as tl

INDEX_POINTERS = ("query_starts", "lengths", "block_table", "shared", "members", "tiles")
COUNTS = ("num_rows", "max_blocks", "max_splits")
"""Arguments whose values make no other kernel: none is compiled while requests are served."""


@triton.jit
def softmax_over(
    query,  # [M, D]
    keys,
    values,  # pointers to position 0 of block 0 of one KV head
    table,  # pointer to the block table of a row
    start,
    end,
    query_positions,  # [M] the last position that each query sees, if CAUSAL
    scale,  # times log2(e): powers of 2 are cheaper
    M: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention over the positions start .. end: sums [M, D] of values, maxima [M] of scores and
    sums [M] of 2^(score - maximum)."""
    dims = tl.arange(0, D)
    columns = tl.arange(0, N)
    maximum = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, D), tl.float32)
    for first in tl.range(start, end, N, num_stages=STAGES):
        positions = first + columns
        live = positions < end
        blocks = tl.load(table + positions // BLOCK, mask=live, other=0)
        slots = blocks.to(tl.int64) * BLOCK + positions % BLOCK
        offsets = slots[:, None] * STRIDE + dims[None, :]
        loaded = live[:, None]
        if HEAD_DIM < D:
            loaded = loaded & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + offsets, mask=loaded, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        sees = live[None, :]
        if CAUSAL:
            sees = sees & (positions[None, :] <= query_positions[:, None])
        scores = tl.where(sees, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        value = tl.load(values + offsets, mask=loaded, other=0.0)
        out = out * decay[:, None]
        out = tl.dot(weights.to(value.dtype), value, acc=out, input_precision="ieee")
        maximum = new_maximum
    return out, maximum, total
