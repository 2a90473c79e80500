"""The layout of a pass as lists built position by position: what the step's buffers must equal."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.row_groups import Group
from prefixd.server.model.rows import Row


def slots_of(block_table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Slots of positions ``start .. end`` under a block table."""
    return [
        block_table[position // block_size] * block_size + position % block_size
        for position in range(start, end)
    ]


def slots(batch: FlatBatch, block_size: int) -> list[int]:
    """Where each flat token's KV is written."""
    return [
        slot
        for row in batch.rows
        for slot in slots_of(row.block_table, row.start, row.end, block_size)
    ]


def positions(batch: FlatBatch) -> list[int]:
    """The position of each flat token in its sequence."""
    return [position for row in batch.rows for position in range(row.start, row.end)]


def group_rows(
    rows: Sequence[Row], *, block_size: int, num_kv_heads: int, device: torch.device
) -> tuple[Group, ...]:
    """Group rows of similar size, so that padding at most doubles the work."""
    by_size: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        by_size[row.length.bit_length(), row.end.bit_length()].append(row)
    return tuple(
        _group(members, block_size=block_size, num_kv_heads=num_kv_heads, device=device)
        for members in by_size.values()
    )


def _group(rows: list[Row], *, block_size: int, num_kv_heads: int, device: torch.device) -> Group:
    num_queries = max(row.length for row in rows)
    num_positions = max(row.end for row in rows)
    slots = torch.full((len(rows), num_positions), NULL_BLOCK * block_size)  # [R, T]
    queries = torch.zeros(len(rows), num_queries, dtype=torch.long)  # [R, Q]
    for index, row in enumerate(rows):
        slots[index, : row.end] = torch.tensor(slots_of(row.block_table, 0, row.end, block_size))
        queries[index] = row.offset
        queries[index, : row.length] += torch.arange(row.length)
    heads = torch.arange(num_kv_heads)[None, :, None]
    kv_rows = (slots[:, None, :] * num_kv_heads + heads).reshape(-1)  # [R * num_kv_heads * T]
    lengths = torch.tensor([row.length for row in rows])
    real = (torch.arange(num_queries)[None] < lengths[:, None]).reshape(-1).nonzero()[:, 0]
    padded = len(real) < len(rows) * num_queries
    flat = queries.reshape(-1)
    return Group(
        size=len(rows),
        num_queries=num_queries,
        queries=flat.to(device),
        kv_rows=kv_rows.to(device),
        mask=_visible(rows, num_queries, num_positions, device),
        real=real.to(device) if padded else None,
        targets=flat[real].to(device),
    )


def _visible(
    rows: list[Row], num_queries: int, num_positions: int, device: torch.device
) -> torch.Tensor | None:
    """The mask [R, 1, Q, T]: True where a query sees a position, its own and all earlier ones.

    A padding query sees what the last real query of its row sees; its output is dropped.
    """
    starts = torch.tensor([row.start for row in rows])
    ends = torch.tensor([row.end for row in rows])
    if num_queries == 1 and int(ends.min()) == num_positions:
        return None
    sees = torch.minimum(starts[:, None] + torch.arange(num_queries) + 1, ends[:, None])  # [R, Q]
    return (torch.arange(num_positions) < sees[:, :, None])[:, None].to(device)
