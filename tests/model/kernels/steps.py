"""Ragged steps as the kernels get them, with NaN wherever nothing may be read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model import gathered
from prefixd.server.model.attention import Options
from prefixd.server.model.kernels import RaggedRows, members_per_tile
from prefixd.server.model.rows import Row
from tests.model.list_layout import group_rows

SCALE = 0.17


@dataclass(frozen=True)
class Case:
    """One row: its last ``queries`` of ``length`` positions are computed in the step. The first
    ``shared`` are those of ``prefix``. ``length`` 0 is padding. ``seed`` decides the data."""

    length: int
    queries: int = 1
    shared: int = 0
    prefix: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sizes:
    """The model and the pool of a step."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Step:
    """The arguments of ``attend``, and where its rows are for the reference."""

    queries: torch.Tensor
    kv: torch.Tensor
    rows: RaggedRows
    cases: tuple[Case, ...]
    tables: tuple[list[int], ...]

    @property
    def max_queries(self) -> int:
        return max(case.queries for case in self.cases)

    @property
    def max_length(self) -> int:
        return max(1, *(case.length for case in self.cases))

    def of(self, row: int) -> slice:
        """The flat tokens of a row."""
        return slice(*self.rows.query_starts[row : row + 2].tolist())


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lay_out(cases: Sequence[Case], sizes: Sizes) -> Step:
    """A step of some rows; the block tables are in random order, the data is each row's own."""
    block = sizes.block_size
    prefixes = {case.prefix: case.shared // block for case in cases if case.shared}
    needed = sum(prefixes.values()) + sum(-(-case.length // block) for case in cases)
    free = (torch.randperm(needed, generator=_generator(len(cases))) + NULL_BLOCK + 1).tolist()
    heads = {name: [free.pop() for _ in range(count)] for name, count in prefixes.items()}
    kv = torch.full((2, needed + 1, block, sizes.kv_heads, sizes.head_dim), torch.nan)
    tables, queries = [], []
    for case in cases:
        table = list(heads.get(case.prefix, ())) if case.shared else []
        own = -(-case.length // block) - len(table)
        table += [free.pop() for _ in range(own)]
        _fill(kv, table, 0, case.shared, seed=1000 + case.prefix)
        _fill(kv, table, case.shared, case.length, seed=2000 + case.seed)
        num_heads = sizes.kv_heads * sizes.group
        shape = (case.queries, num_heads, sizes.head_dim)
        queries.append(torch.randn(shape, generator=_generator(3000 + case.seed)))
        tables.append(table)
    return Step(
        torch.cat(queries).to(sizes.dtype),
        kv.to(sizes.dtype),
        _ragged_rows(cases, tables, sizes.group),
        tuple(cases),
        tuple(tables),
    )


def _ragged_rows(cases: Sequence[Case], tables: Sequence[list[int]], group: int) -> RaggedRows:
    starts = torch.tensor([0, *(case.queries for case in cases)]).cumsum(0)
    block_table = torch.full((len(cases), max(1, *map(len, tables))), -(10**6))
    for row, table in enumerate(tables):
        block_table[row, : len(table)] = torch.tensor(table)
    members: list[int] = []
    tiles: list[tuple[int, int]] = []
    for prefix in sorted({case.prefix for case in cases if case.shared}):
        under = [r for r, case in enumerate(cases) if case.shared and case.prefix == prefix]
        for first in range(0, len(under), members_per_tile(group)):
            part = under[first : first + members_per_tile(group)]
            tiles.append((len(members), len(part)))
            members += part
    members += [0] * (len(cases) - len(members))
    tiles.append((0, 0))
    return RaggedRows(
        query_starts=starts.int(),
        lengths=int32([case.length for case in cases]),
        block_table=block_table.int(),
        shared=int32([case.shared for case in cases]),
        members=int32(members),
        tiles=int32(tiles),
    )


def expected(step: Step) -> torch.Tensor:
    """What the attention of the module computes, in float32; rows of padding are 0."""
    _, _, block_size, kv_heads, head_dim = step.kv.shape
    rows = [
        Row(step.of(r).start, case.length - case.queries, case.queries, step.tables[r])
        for r, case in enumerate(step.cases)
        if case.length
    ]
    device = torch.device("cpu")
    groups = group_rows(rows, block_size=block_size, num_kv_heads=kv_heads, device=device)
    flat = step.queries.float().view(len(step.queries), kv_heads, -1, head_dim)
    out = torch.zeros_like(flat)
    pool = step.kv.to(torch.float32, copy=True)
    pool[:, NULL_BLOCK] = 0  # read by the reference for padding, by the kernels never
    keys, values = pool.view(2, -1, head_dim)
    for group in groups:
        attended = gathered.attended_by(group, flat, (keys, values), Options(SCALE))
        out.index_copy_(0, group.targets, attended)
    return out.view_as(step.queries)


def _fill(kv: torch.Tensor, table: list[int], start: int, end: int, *, seed: int) -> None:
    """Random keys and values at some positions, the same for the same seed."""
    positions = torch.arange(start, end)
    blocks = torch.tensor(table, dtype=torch.long)[positions // kv.shape[2]]
    data = torch.randn((len(positions), 2, *kv.shape[3:]), generator=_generator(seed))
    kv[:, blocks, positions % kv.shape[2]] = data.transpose(0, 1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
