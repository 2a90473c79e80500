"""Draws: the same token by each way of looking it up."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.model.draws import (
    ONE,
    Filters,
    cut,
    head,
    in_order,
    likeliest,
    look_up,
    weights,
)

WIDTHS = [5, 64, 1000, 1024, 1025, 1088, 2050, 4096]


def rows(width: int, *, num: int = 3, seed: int = 0) -> torch.Tensor:
    """Probabilities with many that are equal, as 16-bit logits have."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, width, generator=generator).bfloat16().float()
    return logits.softmax(dim=-1)


@given(
    width=st.sampled_from(WIDTHS),
    seed=st.integers(0, 99),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_looked_up_in_the_exact_sum(width: int, seed: int, uniform: float) -> None:
    probs = rows(width, num=1, seed=seed)
    weight = weights(probs.clone())
    index = int(look_up(weight, torch.tensor([uniform], dtype=torch.float64)))
    values = weight[0].tolist()
    assert all(
        abs(w - Fraction(p) * ONE) < 1 for w, p in zip(values, probs[0].tolist(), strict=True)
    )
    total = sum(values)
    target = min(int(uniform * float(total)), total - 1)
    assert sum(values[:index]) <= target < sum(values[: index + 1])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(width: int, uniform: float) -> None:
    probs = torch.zeros(2, width)
    probs[0, 3] = 1.0
    probs[1, 1:4] = 1 / 3
    drawn = look_up(weights(probs), torch.tensor([uniform, uniform], dtype=torch.float64))
    assert drawn.tolist() == [3, 1 if uniform == 0 else 3]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_head_is_the_start_of_the_sorted_row_equal_ones_by_id(width: int) -> None:
    probs = rows(width)
    ordered, ids = in_order(probs)
    for count in (1, 7, 64, 1024):
        top, top_ids = head(probs, count)
        assert torch.equal(top, ordered[:, :count])
        assert torch.equal(top_ids, ids[:, :count])
    logprobs = probs.log()
    top, top_ids = likeliest(logprobs, 5)
    ordered, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top, ordered[:, :5])
    assert torch.equal(top_ids, ids[:, :5])


@given(
    seed=st.integers(0, 99),
    count=st.sampled_from([1, 3, 64, 700]),
    top_k=st.sampled_from([1, 3, 64, 600, 2000]),
    top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.1]),
)
def test_a_settled_cut_of_the_head_is_that_of_the_sorted_row(
    seed: int, count: int, top_k: int, top_p: float, min_p: float
) -> None:
    probs = rows(2000, seed=seed)
    filters = Filters(
        top_k=torch.full([3], top_k), top_p=torch.full([3], top_p), min_p=torch.full([3], min_p)
    )
    whole, always = cut(in_order(probs)[0], filters, num_ids=2000)
    part, settled = cut(head(probs, count)[0], filters, num_ids=2000)
    assert always.all()
    for row in range(3):
        if settled[row]:
            assert torch.equal(part[row], whole[row, :count])
            assert not whole[row, count:].any()
        assert settled[row] or top_k > count
