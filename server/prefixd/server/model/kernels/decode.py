"""Attention of rows with one query, in Triton.

::

    one row          |  shared prefix: a tile of rows  |    its own positions    |
    programs         |   split 0    | split 1 | split 2|   split 3   | split 4 |5|
    partials         one softmax each, with the logarithm of its sum of powers of 2
    combine          in the order of the splits

A row's splits begin at 0 and at the end of its shared prefix, have SPLIT positions each (the last
of both parts fewer) and are merged in order.
"""

import triton
import triton.language as tl

from prefixd.server.model.kernels.softmax import COUNTS, INDEX_POINTERS, softmax_over


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDEX_POINTERS)
def decode_own_positions(
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
    out, maximum, total = softmax_over(
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
def decode_shared_prefix(
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
    out, maximum, total = softmax_over(
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
