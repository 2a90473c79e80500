"""Attention over block tables in Triton.

::

    decode row      |  shared prefix: a tile of rows  |   its own positions     |
    programs        |   split 0    | split 1 | split 2|  split 3   | split 4 | 5|
    partials        one softmax each, with its logarithm of the sum of powers of 2
    combine         in the order of the splits

A row's splits begin at 0 and at the end of its shared prefix, have SPLIT positions each (the last
of both parts fewer) and are merged in order. The heads of one KV head are rows of a query tile of
fixed height, of which unused rows are computed and dropped: no row's bits depend on others.

A row with several queries is computed by one program for each tile of its queries, without splits.
Positions at or past a row's length are never loaded.
"""

import triton
import triton.language as tl

INDEX_POINTERS = ("query_starts", "lengths", "block_table", "shared", "members", "tiles")
COUNTS = ("num_rows", "max_blocks", "max_splits")
"""Arguments whose values make no other kernel: none is compiled while requests are served."""


@triton.jit
def _softmax_over(
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


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_POINTERS)
def decode_own(
    queries,
    keys,
    values,
    partials,
    powers,
    query_starts,
    lengths,
    block_table,
    shared,
    max_blocks,
    max_splits,
    scale,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of the positions that only one row reads. Grid: KV heads, splits, rows."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    token = tl.load(query_starts + row)
    length = tl.load(lengths + row)
    prefix = tl.load(shared + row)
    start = prefix + split * SPLIT
    if tl.load(query_starts + row + 1) - token != 1:
        return
    if start >= length:
        return
    rows = tl.arange(0, M)
    dims = tl.arange(0, D)
    real = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = (token * KV_HEADS + kv_head) * GROUP + rows
    query = tl.load(queries + heads[:, None] * HEAD_DIM + dims[None, :], mask=real, other=0.0)
    out, maximum, total = _softmax_over(
        query,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        block_table + row * max_blocks,
        start,
        tl.minimum(start + SPLIT, length),
        rows,
        scale,
        M,
        D,
        N,
        HEAD_DIM,
        BLOCK,
        KV_HEADS * HEAD_DIM,
        False,
        STAGES,
    )
    place = (row * max_splits + tl.cdiv(prefix, SPLIT) + split).to(tl.int64)
    at = (place * KV_HEADS + kv_head) * GROUP + rows
    tl.store(powers + at, maximum + tl.log2(total), mask=rows < GROUP)
    tl.store(partials + at[:, None] * HEAD_DIM + dims[None, :], out / total[:, None], mask=real)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_POINTERS)
def decode_shared(
    queries,
    keys,
    values,
    partials,
    powers,
    query_starts,
    lengths,
    block_table,
    shared,
    members,
    tiles,
    max_blocks,
    max_splits,
    scale,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of a shared prefix, for all rows of a tile. Grid: KV heads, splits, tiles."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    count = tl.load(tiles + 2 * tile + 1)
    if count == 0:
        return
    first = tl.load(tiles + 2 * tile)
    leader = tl.load(members + first)
    prefix = tl.load(shared + leader)
    start = split * SPLIT
    if start >= prefix:
        return
    rows = tl.arange(0, M)
    dims = tl.arange(0, D)
    present = rows // GROUP < count
    row = tl.load(members + first + rows // GROUP, mask=present, other=0)
    token = tl.load(query_starts + row, mask=present, other=0)
    next_token = tl.load(query_starts + row + 1, mask=present, other=0)
    # Rows of several queries and of padding may be in a tile; they are computed elsewhere or never.
    present = present & (next_token - token == 1)
    present = present & (tl.load(lengths + row, mask=present, other=0) > 0)
    real = present[:, None] & (dims < HEAD_DIM)[None, :]
    heads = (token * KV_HEADS + kv_head) * GROUP + rows % GROUP
    query = tl.load(queries + heads[:, None] * HEAD_DIM + dims[None, :], mask=real, other=0.0)
    out, maximum, total = _softmax_over(
        query,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        block_table + leader * max_blocks,
        start,
        tl.minimum(start + SPLIT, prefix),
        rows,
        scale,
        M,
        D,
        N,
        HEAD_DIM,
        BLOCK,
        KV_HEADS * HEAD_DIM,
        False,
        STAGES,
    )
    place = (row * max_splits + split).to(tl.int64)
    at = (place * KV_HEADS + kv_head) * GROUP + rows % GROUP
    tl.store(powers + at, maximum + tl.log2(total), mask=present)
    tl.store(partials + at[:, None] * HEAD_DIM + dims[None, :], out / total[:, None], mask=real)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_POINTERS)
def combine(
    out,
    partials,
    powers,
    query_starts,
    lengths,
    shared,
    max_splits,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Merge the partials of a decode row in the order of its splits; 0 for a row of padding.
    Grid: heads, rows."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    token = tl.load(query_starts + row)
    if tl.load(query_starts + row + 1) - token != 1:
        return
    length = tl.load(lengths + row)
    prefix = tl.load(shared + row)
    splits = tl.where(length > 0, tl.cdiv(prefix, SPLIT) + tl.cdiv(length - prefix, SPLIT), 0)
    dims = tl.arange(0, D)
    real = dims < HEAD_DIM
    maximum = float("-inf")
    total = 0.0
    merged = tl.zeros((D,), tl.float32)
    for first in range(0, splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        live = split < splits
        at = (row * max_splits + split).to(tl.int64) * HEADS + head
        power = tl.load(powers + at, mask=live, other=float("-inf"))
        part = tl.load(
            partials + at[:, None] * HEAD_DIM + dims[None, :],
            mask=live[:, None] & real[None, :],
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, tl.max(power, 0))
        weights = tl.exp2(power - new_maximum)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 0)
        merged = merged * decay + tl.sum(weights[:, None] * part, 0)
        maximum = new_maximum
    merged = merged / tl.where(splits > 0, total, 1.0)
    tl.store(out + (token * HEADS + head) * HEAD_DIM + dims, merged, mask=real)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_POINTERS)
def prefill(
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
    attended, _, total = _softmax_over(
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
