"""The flat layout of a step for one forward pass."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from prefixd.server.engine.step import NULL_BLOCK, Chunk, CompileChunk
from prefixd.server.model.attention import Group
from prefixd.server.model.kv_cache import slots_of
from prefixd.server.model.prefix import HardPrompt, SoftPrompt


@dataclass(slots=True)
class Row:
    """The part of a pass that belongs to one sequence or compiling prefix: ``length`` positions
    from ``start``, at ``offset`` in the flat tokens."""

    offset: int
    start: int
    length: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        """Positions in the pool after this pass; the last token sees all of them."""
        return self.start + self.length


@dataclass(slots=True)
class FlatBatch:
    """One forward pass as a flat row of tokens: ``rows`` one after another.

    ``token_ids`` [num_tokens] is 0 where the input is given: ``inputs`` holds the place in the flat
    tokens and the embeddings [n, embedding_width] of each run of n such tokens. ``outputs`` are the
    flat tokens whose logits are wanted.
    """

    rows: list[Row] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    inputs: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def slots(self, block_size: int) -> list[int]:
        """Where each flat token's KV is written."""
        return [
            slot
            for row in self.rows
            for slot in slots_of(row.block_table, row.start, row.end, block_size)
        ]

    @property
    def positions(self) -> list[int]:
        """The position of each flat token in its sequence."""
        return [position for row in self.rows for position in range(row.start, row.end)]


def lay_out(
    chunks: Sequence[Chunk],
    compiles: Sequence[CompileChunk] = (),
    *,
    outputs: list[int] | None = None,
) -> FlatBatch:
    """Chunks, then compiles, in one pass. ``outputs``: by default the last token of each chunk with
    ``sampling``, and its proposed tokens."""
    batch = FlatBatch()
    for chunk in chunks:
        batch.rows.append(Row(len(batch.token_ids), chunk.start, chunk.length, chunk.block_table))
        batch.token_ids += chunk.tokens
        if chunk.sampling is not None:
            batch.outputs.append(len(batch.token_ids) - 1)
        if chunk.draft is not None:
            num_before = len(batch.token_ids)
            batch.token_ids += chunk.draft.tokens
            batch.outputs += range(num_before, len(batch.token_ids))
    for part in compiles:
        offset, length = len(batch.token_ids), part.stop - part.start
        batch.rows.append(Row(offset, part.start, length, part.block_table))
        if isinstance(part.payload, HardPrompt):
            batch.token_ids += part.payload.token_ids[part.start : part.stop]
        else:
            assert isinstance(part.payload, SoftPrompt)
            batch.inputs.append((offset, part.payload.embeddings[part.start : part.stop]))
            batch.token_ids += [0] * length
    if outputs is not None:
        batch.outputs = outputs
    return batch


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
