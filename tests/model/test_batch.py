"""The groups in which rows of similar size attend, and the positions that each query sees."""

import torch

from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import StepBuffers
from prefixd.server.model.row_groups import ALL, Group, Visibility, group_rows
from prefixd.server.model.rows import Row

CPU = torch.device("cpu")


def mask_rows(group: Group) -> list[list[str]]:
    assert group.mask is not None
    return [["".join("01"[int(v)] for v in line) for line in row[0]] for row in group.mask]


def groups(*rows: Row, num_kv_heads: int = 1, visibility: Visibility = ALL) -> tuple[Group, ...]:
    buffers = StepBuffers(block_size=4, scratch_slot=400, device=CPU)
    buffers.fill(FlatBatch(list(rows), [0] * sum(row.length for row in rows)))
    return group_rows(rows, buffers, num_kv_heads=num_kv_heads, device=CPU, visibility=visibility)


def test_each_query_of_a_chunk_sees_its_own_and_earlier_positions() -> None:
    (group,) = groups(Row(0, 1, 3, [1]))
    assert mask_rows(group) == [["1100", "1110", "1111"]]


def test_padding_queries_see_what_the_last_query_sees_and_are_dropped() -> None:
    (group,) = groups(Row(0, 1, 3, [1]), Row(3, 2, 2, [2]))
    assert mask_rows(group) == [["1100", "1110", "1111"], ["1110", "1111", "1111"]]
    assert group.real is not None
    assert group.real.tolist() == [0, 1, 2, 3, 4]
    assert group.targets.tolist() == [0, 1, 2, 3, 4]


def test_decode_rows_of_equal_length_need_no_mask() -> None:
    (group,) = groups(Row(0, 5, 1, [1, 2]), Row(1, 5, 1, [3, 4]))
    assert group.mask is None
    assert group.kv_rows.tolist() == [4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17]


def test_a_shorter_decode_row_reads_the_null_block_after_its_end() -> None:
    (group,) = groups(Row(0, 5, 1, [1, 2]), Row(1, 4, 1, [3, 4]))
    assert mask_rows(group) == [["111111"], ["111110"]]
    assert group.kv_rows.tolist()[-1] == 0


def test_a_long_prefix_does_not_pad_other_rows() -> None:
    long = Row(0, 99, 1, list(range(1, 26)))
    short = Row(1, 3, 1, [30])
    assert sorted(group.kv_rows.numel() for group in groups(long, short)) == [4, 100]


def test_kv_heads_of_a_slot_are_adjacent_in_the_pool() -> None:
    (group,) = groups(Row(0, 1, 1, [1]), num_kv_heads=2)
    assert group.kv_rows.tolist() == [8, 10, 9, 11]  # head 0 of slots 4 and 5, then head 1


def test_a_window_gathers_what_its_queries_see_alone() -> None:
    row = Row(0, 9, 3, [1, 2, 3])
    (group,) = groups(row, visibility=Visibility(window=3))
    assert group.kv_rows.tolist() == list(range(4 + 7, 4 + 12))  # positions 7 to 11
    assert mask_rows(group) == [["11100", "01110", "00111"]]


def test_a_chunk_hides_what_is_before_it() -> None:
    (group,) = groups(Row(0, 9, 3, [1, 2, 3]), visibility=Visibility(chunk=5))
    assert group.kv_rows.tolist() == list(range(4 + 5, 4 + 12))
    assert mask_rows(group) == [["1111100", "0000010", "0000011"]]


def test_rows_of_any_length_share_a_group_past_the_window() -> None:
    long, short = Row(0, 99, 1, list(range(1, 26))), Row(1, 12, 1, [30, 31, 32, 33])
    (group,) = groups(long, short, visibility=Visibility(window=4))
    assert group.mask is None
    assert group.kv_rows.tolist() == [100, 101, 102, 103, 129, 130, 131, 132]
