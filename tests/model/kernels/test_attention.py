"""The attention kernels equal the module's attention, and a row has the same bits in any step."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.model.kernels import SPLIT_LENGTH, members_per_tile
from tests.model.kernels.interpreter import DEVICE, Launcher
from tests.model.kernels.steps import SCALE, Case, Sizes, Step, expected, lay_out

SPLIT = 32
"""The length of a split in most tests: the interpreter takes milliseconds for each program."""

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# The interpreter computes products in bfloat16 wrongly.
DTYPES = ("float32", "float16") if DEVICE == "cpu" else ("float32", "float16", "bfloat16")

EDGES = (
    *(Case(SPLIT - 1, seed=1), Case(SPLIT, seed=2), Case(SPLIT + 1, seed=3), Case(15, seed=4)),
    *(Case(16, seed=5), Case(17, 17, seed=6), Case(50, 3, seed=7), Case(0, seed=8)),
    *(Case(1, seed=9), Case(49, shared=48, seed=10), Case(67, shared=48, seed=11)),
)
"""Around the edges of blocks and splits; a prefix that ends within a split."""

QUICK = {("float32", 3, 64), ("float16", 4, 128), ("float32", 8, 64), ("float16", 1, 64)}


def attended(kernels: Launcher, step: Step, *, split: int = SPLIT) -> torch.Tensor:
    out: torch.Tensor = kernels.launch(
        "attend",
        step.queries,
        step.kv,
        *step.rows,
        scale=SCALE,
        max_queries=step.max_queries,
        max_length=step.max_length,
        split_length=split,
    )
    return out


def require_close(step: Step, out: torch.Tensor) -> None:
    tolerance = TOLERANCES[out.dtype]
    for row in range(len(step.cases)):
        torch.testing.assert_close(
            out[step.of(row)].float(), expected(step)[step.of(row)], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        pytest.param(
            *(getattr(torch, dtype), group, head_dim),
            id=f"{dtype}-{group}-{head_dim}",
            marks=() if (dtype, group, head_dim) in QUICK else pytest.mark.slow,
        )
        for dtype in DTYPES
        for group in (1, 3, 4, 8)
        for head_dim in (64, 128)
    ],
)
def test_rows_around_edges(
    kernels: Launcher, dtype: torch.dtype, group: int, head_dim: int
) -> None:
    step = lay_out(EDGES, Sizes(kv_heads=1, group=group, head_dim=head_dim, dtype=dtype))
    require_close(step, attended(kernels, step))


def test_other_head_and_block_sizes(kernels: Launcher) -> None:
    sizes = Sizes(kv_heads=3, group=17, head_dim=48, block_size=8)
    step = lay_out([Case(19, 4, seed=1), Case(41, shared=8, seed=2), Case(9, seed=3)], sizes)
    require_close(step, attended(kernels, step))


@pytest.mark.slow
def test_splits_of_the_length_that_is_served(kernels: Launcher) -> None:
    lengths = (SPLIT_LENGTH - 1, SPLIT_LENGTH, SPLIT_LENGTH + 1, 17 * SPLIT_LENGTH + 5)
    cases = [Case(length, seed=length) for length in lengths]
    cases += [Case(600, shared=512, prefix=1, seed=1), Case(300, shared=272, prefix=2, seed=2)]
    step = lay_out([*cases, Case(500, 200, seed=3)], Sizes())
    require_close(step, attended(kernels, step, split=SPLIT_LENGTH))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prefix = draw(st.integers(0, 2))
    shared = 16 * (0, 2, 3)[prefix]
    queries = draw(st.sampled_from([1, 1, 2, 9, 33]))
    lowest = max(shared + 1, queries)
    near = [edge + off for edge in (16, 32, 48, 64, 96) for off in (-1, 0, 1)]
    length = draw(st.sampled_from([n for n in near if n >= lowest]) | st.integers(lowest, 100))
    if draw(st.integers(0, 7)) == 0:
        return Case(0, queries, seed=draw(st.integers(0, 99)))
    return Case(length, queries, shared, prefix, seed=draw(st.integers(0, 99)))


@pytest.mark.slow
@given(rows=st.lists(cases(), min_size=1, max_size=6), group=st.sampled_from([1, 3, 4, 8]))
@settings(max_examples=20)
def test_any_mix_of_rows(kernels: Launcher, rows: list[Case], group: int) -> None:
    step = lay_out(rows, Sizes(kv_heads=1, group=group))
    out = attended(kernels, step)
    for row, case in enumerate(rows):
        if case.length:
            tokens = step.of(row)
            torch.testing.assert_close(out[tokens], expected(step)[tokens], rtol=0, atol=1e-5)


SHARER, OWN, PREFILL = Case(272, shared=256, seed=7), Case(270, seed=7), Case(40, 13, seed=7)

STEPS: dict[str, tuple[Case, Sequence[Case]]] = {
    "3 sharers": (SHARER, [Case(290 + i, shared=256, seed=i) for i in range(3)]),
    "63 sharers": (SHARER, [Case(257 + i % 5, shared=256, seed=i) for i in range(63)]),
    "another prefix": (SHARER, [Case(300, shared=272, prefix=1, seed=1)] * 2),
    "prefill and padding": (SHARER, [Case(90, 40, seed=1), Case(0), Case(300, 3, 256, seed=2)]),
    "own, longer": (OWN, [Case(1100, seed=1), Case(1, seed=2)]),
    "own, prefill and sharers": (OWN, [Case(90, 70, seed=1), *[Case(260, 1, 256, seed=2)] * 2]),
    "prefill, decode": (PREFILL, [Case(300, seed=1), Case(260, shared=256, seed=2)]),
    "prefill, prefill": (PREFILL, [Case(90, 70, seed=1), Case(0, 3), Case(35, 35, seed=2)]),
}


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize(
    ("row", "others"),
    [
        pytest.param(*step, id=name, marks=[pytest.mark.slow] if name == "63 sharers" else [])
        for name, step in STEPS.items()
    ],
)
def test_row_has_the_same_bits_in_any_step(
    kernels: Launcher, row: Case, others: Sequence[Case], dtype: str
) -> None:
    sizes = Sizes(kv_heads=1, group=4, dtype=getattr(torch, dtype))
    alone = attended(kernels, lay_out([row], sizes), split=SPLIT_LENGTH)
    place = len(others) // 2
    step = lay_out([*others[:place], row, *others[place:]], sizes)
    out = attended(kernels, step, split=SPLIT_LENGTH)
    assert torch.equal(out[step.of(place)], alone)


def test_nan_of_a_row_stays_in_it(kernels: Launcher) -> None:
    sizes = Sizes(kv_heads=1, group=4)
    cases = [Case(70, shared=48, seed=1), Case(70, shared=48, seed=2), Case(20, 5, seed=3)]
    step = lay_out(cases, sizes)
    whole = attended(kernels, step)
    for row, case in enumerate(cases):
        queries = step.queries.clone()
        queries[step.of(row)] = torch.nan
        out = attended(kernels, replace(step, queries=queries))
        assert out[step.of(row)].isnan().all()
        others = torch.ones(len(out), dtype=torch.bool)
        others[step.of(row)] = False
        assert torch.equal(out[others], whole[others]), case


def test_a_tile_has_room_for_each_group() -> None:
    assert [members_per_tile(group) for group in (1, 3, 4, 8, 32)] == [32, 10, 8, 4, 1]
