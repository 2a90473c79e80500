"""The buffers of a step equal lists built position by position, over successive steps."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.engine.step import NULL_BLOCK, Chunk
from prefixd.server.model.batch import FlatBatch, lay_out
from prefixd.server.model.buffers import StepBuffers, StepSizes
from prefixd.server.model.kernels import MIN_SHARED
from prefixd.server.model.row_groups import group_rows as groups_of_buffers
from tests.model import list_layout

CPU = torch.device("cpu")
SIZE = 4
SCRATCH = 4000
TILE_ROWS = 4


def make_buffers(rows: int = 1, tokens: int = 1, max_blocks: int = 1) -> StepBuffers:
    return StepBuffers(
        block_size=SIZE,
        scratch_slot=SCRATCH,
        device=CPU,
        tile_rows=TILE_ROWS,
        sizes=StepSizes(rows, tokens),
        max_blocks=max_blocks,
    )


@dataclass
class Running:
    """A sequence with the blocks that its positions need."""

    table: list[int]
    num_positions: int = 0
    num_prefix: int = 0


@dataclass
class Site:
    """Sequences that run, and the blocks that are free."""

    running: list[Running] = field(default_factory=list)
    next_block: int = 1

    def blocks(self, count: int) -> list[int]:
        start, self.next_block = self.next_block, self.next_block + count
        return list(range(start, start + count))

    def chunk(self, number: int, sequence: Running, length: int) -> Chunk:
        end = sequence.num_positions + length
        sequence.table += self.blocks(-(-end // SIZE) - len(sequence.table))
        tokens = [(7 * position + number) % 97 for position in range(sequence.num_positions, end)]
        chunk = Chunk(
            number,
            tokens,
            sequence.num_positions,
            tuple(sequence.table),
            num_prefix_tokens=sequence.num_prefix,
        )
        sequence.num_positions = end
        return chunk


def check_equal(buffers: StepBuffers, batch: FlatBatch) -> None:
    tensors = buffers.tensors()
    assert tensors.tokens.tolist() == batch.token_ids
    assert tensors.positions.tolist() == list_layout.positions(batch)
    assert tensors.slots.tolist() == list_layout.slots(batch, SIZE)
    assert tensors.outputs.tolist() == batch.outputs
    assert tensors.rows.query_starts.tolist() == [row.offset for row in batch.rows] + [
        len(batch.token_ids)
    ]
    assert tensors.rows.lengths.tolist() == [row.end for row in batch.rows]
    assert (tensors.max_queries, tensors.max_length) == (
        max(row.length for row in batch.rows),
        max(row.end for row in batch.rows),
    )
    for row, table in zip(batch.rows, tensors.rows.block_table.tolist(), strict=True):
        rest = [NULL_BLOCK] * (len(table) - len(row.block_table))
        assert table == [*row.block_table, *rest]
    expected = list_layout.group_rows(batch.rows, block_size=SIZE, num_kv_heads=3, device=CPU)
    groups = groups_of_buffers(batch.rows, buffers, num_kv_heads=3, device=CPU)
    for group, other in zip(groups, expected, strict=True):
        for name in ("size", "num_queries"):
            assert getattr(group, name) == getattr(other, name)
        for name in ("queries", "kv_rows", "mask", "real", "targets"):
            value, reference = getattr(group, name), getattr(other, name)
            assert (value is None) == (reference is None), name
            assert value is None or value.tolist() == reference.tolist(), name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_buffers_equal_lists_over_successive_steps(data: st.DataObject) -> None:
    site, buffers = Site(), make_buffers()
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        for _ in range(data.draw(st.integers(0, 3), label="started")):
            reused = data.draw(st.integers(0, 9), label="reused")
            site.running.append(Running(site.blocks(-(-reused // SIZE)), reused))
        for _ in range(data.draw(st.integers(0, 2), label="ended")):
            if site.running:
                del site.running[data.draw(st.integers(0, len(site.running) - 1), label="which")]
        planned = [s for s in site.running if data.draw(st.booleans(), label="runs")]
        if data.draw(st.booleans(), label="preempted") and planned:
            planned[0].table, planned[0].num_positions = [], 0
        chunks = [
            site.chunk(
                number, sequence, data.draw(st.sampled_from([1, 1, 1, 2, 7]), label="tokens")
            )
            for number, sequence in enumerate(planned)
        ]
        if not chunks:
            continue
        batch = lay_out(chunks)
        batch.outputs = [row.offset + row.length - 1 for row in batch.rows]
        buffers.fill(batch)
        check_equal(buffers, batch)


def decode(site: Site) -> FlatBatch:
    batch = lay_out([site.chunk(i, sequence, 1) for i, sequence in enumerate(site.running)])
    batch.outputs = list(range(len(batch.rows)))
    return batch


def test_a_steady_step_writes_the_block_tables_that_grew_alone() -> None:
    site = Site([Running([], num) for num in range(8)])
    for sequence in site.running:
        sequence.table = site.blocks(-(-sequence.num_positions // SIZE))
    buffers = make_buffers(8, 8, 32)
    buffers.fill(decode(site))
    for _ in range(3 * SIZE):
        before, grown = buffers.entries_written, [len(s.table) for s in site.running]
        batch = decode(site)
        buffers.fill(batch)
        changed = sum(len(s.table) != held for s, held in zip(site.running, grown, strict=True))
        assert buffers.entries_written - before == changed == 2
        check_equal(buffers, batch)


def test_a_larger_step_gets_larger_buffers_and_the_same_contents() -> None:
    site, buffers = Site([Running([])]), make_buffers(2, 2, 32)
    memory = buffers.memory
    buffers.fill(decode(site))
    assert buffers.memory is memory
    site.running += [Running([]), Running([])]
    batch = decode(site)
    buffers.fill(batch)
    assert buffers.memory is not memory
    check_equal(buffers, batch)


def test_padding_writes_to_the_scratch_slot_and_reads_nothing() -> None:
    site, buffers = Site([Running([]), Running([])]), make_buffers()
    batch = decode(site)
    buffers.fill(batch, num_rows=4)
    tensors = buffers.tensors()
    assert tensors.rows.lengths.tolist() == [1, 1, 0, 0]
    assert tensors.slots.tolist() == [*list_layout.slots(batch, SIZE), SCRATCH, SCRATCH]
    assert tensors.rows.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert tensors.outputs.tolist() == [0, 1, 2, 3]
    assert tensors.rows.tiles.tolist() == [[0, 0]] * 4
    assert tensors.tokens.shape == tensors.positions.shape == (4,)


def under(first_block: int, num_prefix: int) -> Running:
    full = num_prefix // SIZE
    own = [first_block + 1000] if num_prefix % SIZE else []
    return Running([*range(first_block, first_block + full), *own], num_prefix, num_prefix)


@pytest.mark.parametrize("num_rows", [None, 32])
def test_rows_under_a_long_prefix_are_the_members_of_its_tiles(num_rows: int | None) -> None:
    long, other, short = MIN_SHARED + SIZE + 1, MIN_SHARED, MIN_SHARED - 1
    prefixes = [(1, long), (200, other), (400, short), (600, 0)]
    order = [0, 1, 0, 3, 2, 1] + [0] * TILE_ROWS
    site = Site([under(*prefixes[i]) for i in order], next_block=3000)
    buffers = make_buffers()
    batch = decode(site)
    buffers.fill(batch, num_rows=num_rows)
    tensors = buffers.tensors()
    expected = [long - 1, other, 0, 0]
    assert tensors.rows.shared.tolist()[: len(order)] == [expected[i] for i in order]
    tiles = [(first, count) for first, count in tensors.rows.tiles.tolist() if count]
    assert len(tensors.rows.tiles) == (num_rows or len(tiles))
    members = tensors.rows.members.tolist()
    found = [members[first : first + count] for first, count in tiles]
    under_long = [i for i, prefix in enumerate(order) if prefix == 0]
    assert found == [under_long[:TILE_ROWS], under_long[TILE_ROWS:], [1, 5]]


def test_a_graph_without_padding_reads_no_tile_of_an_earlier_step() -> None:
    """It has as many tiles as rows in every step."""
    buffers = make_buffers()
    under_prefixes = Site([under(100 * i + 1, MIN_SHARED) for i in range(8)], next_block=3000)
    buffers.fill(decode(under_prefixes), num_rows=8)
    assert (buffers.tensors().rows.tiles[:, 1] > 0).all()
    buffers.fill(decode(Site([Running([]) for _ in range(4)])), num_rows=4)
    assert buffers.tensors().rows.tiles.tolist() == [[0, 0]] * 4


def test_a_shorter_block_table_is_followed_by_the_null_block() -> None:
    buffers = make_buffers()
    chunks = [Chunk(0, [5], 30, tuple(range(1, 9)))]
    buffers.fill(lay_out(chunks))
    buffers.fill(lay_out([replace(chunks[0], start=0, block_table=(9,))]))
    assert buffers.tensors().rows.block_table.tolist()[0][:9] == [9, *[NULL_BLOCK] * 8]


def test_sections_begin_at_multiples_of_128_bytes() -> None:
    buffers = make_buffers(3, 5, 7)
    buffers.fill(decode(Site([Running([]), Running([])])), num_rows=3)
    tensors = buffers.tensors()
    parts = [tensors.tokens, tensors.positions, tensors.slots, tensors.outputs, *tensors.rows]
    assert {(part.data_ptr() - buffers.memory.data_ptr()) % 128 for part in parts} == {0}
