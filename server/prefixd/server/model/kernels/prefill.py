"""Attention of rows with several queries, in Triton: one program for each tile of queries."""

import triton
import triton.language as tl

from prefixd.server.model.kernels.softmax import COUNTS, INDEX_POINTERS, softmax_over


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_POINTERS)
def prefill_tiles(
    out,
    queries,
    keys,
    values,
    query_starts,
    lengths,
    block_table,
    num_rows,
    max_blocks,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """M // GROUP queries of a row that has more than one. Grid: KV heads, tiles.

    Row r has the tiles from ``query_starts[r] // (M // GROUP) + r`` on: as many as it needs and at
    most one more, so that the number of tiles follows from that of tokens and rows.
    """
    TALL: tl.constexpr = M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    row = 0
    beyond = num_rows
    while beyond - row > 1:
        middle = (row + beyond) // 2
        if tl.load(query_starts + middle) // TALL + middle <= tile:
            row = middle
        else:
            beyond = middle
    first_token = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - first_token
    first = (tile - first_token // TALL - row) * TALL
    length = tl.load(lengths + row)
    if num_queries < 2:
        return
    if first >= num_queries:
        return
    if length == 0:
        return
    rows = tl.arange(0, M)
    dims = tl.arange(0, D)
    query_index = first + rows // GROUP
    present = (rows < TALL * GROUP) & (query_index < num_queries)
    real = present[:, None] & (dims < HEAD_DIM)[None, :]
    heads = ((first_token + query_index).to(tl.int64) * KV_HEADS + kv_head) * GROUP + rows % GROUP
    at = heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(queries + at, mask=real, other=0.0)
    start = length - num_queries
    attended, _, total = softmax_over(
        query,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        block_table + row * max_blocks,
        0,
        tl.minimum(start + first + TALL, length),
        start + query_index,
        scale,
        M,
        D,
        N,
        HEAD_DIM,
        BLOCK,
        KV_HEADS * HEAD_DIM,
        True,
        STAGES,
    )
    tl.store(out + at, attended / total[:, None], mask=real)
