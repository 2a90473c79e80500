"""The sampler: a row's token depends on that row alone."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.engine.constraint import bit_mask
from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Sampled
from prefixd.server.model import sampler
from prefixd.server.model.decoder import Logits

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0])
GREEDY = SamplingParams(temperature=0)


def sample(logits: torch.Tensor, chunks: list[Chunk]) -> list[Sampled]:
    return sampler.sample(Logits(logits), chunks)


def chunk(params: SamplingParams, *, uniform: float = 0.5, **more: object) -> Chunk:
    return Chunk(0, [1], 0, [1], sampling=params, uniform=uniform, **more)  # type: ignore[arg-type]


def one(params: SamplingParams, *, uniform: float = 0.5, **more: object) -> Sampled:
    return sample(LOGITS[None], [chunk(params, uniform=uniform, **more)])[0]


def reachable(params: SamplingParams) -> set[int]:
    """Token ids that at least one random number selects."""
    draws = [(i + 0.5) / 400 for i in range(400)]
    rows = LOGITS.repeat(len(draws), 1)
    return {s.token_id for s in sample(rows, [chunk(params, uniform=u) for u in draws])}


def test_greedy_sampling_selects_the_largest_logit() -> None:
    assert one(GREEDY).token_id == 4


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=1), {4}),
        (SamplingParams(top_k=2), {4, 0}),
        (SamplingParams(top_k=10**30), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.01), {4}),
        (SamplingParams(top_p=1e-50), {4}),
        (SamplingParams(top_p=0.7), {4, 0}),  # probabilities 0.63, 0.23, 0.09, 0.05, 0.01
        (SamplingParams(min_p=0.3), {4, 0}),
        (SamplingParams(min_p=1.0), {4}),
        (SamplingParams(top_k=3, top_p=0.7), {4, 0}),
        (SamplingParams(), {0, 1, 2, 3, 4}),
        (SamplingParams(temperature=0.05), {4}),
        (SamplingParams(logit_bias={3: 100.0}), {3}),
        (SamplingParams(logit_bias={4: -100.0}, top_k=1), {0}),
    ],
)
def test_filters_keep_exactly_the_expected_tokens(
    params: SamplingParams, expected: set[int]
) -> None:
    assert reachable(params) == expected


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.999)])
def test_samples_follow_the_distribution(params: SamplingParams) -> None:
    count = 4000
    rows = LOGITS.repeat(count, 1)
    drawn = sample(rows, [chunk(params, uniform=(i + 0.5) / count) for i in range(count)])
    seen = Counter(s.token_id for s in drawn)
    for token_id, probability in enumerate(LOGITS.softmax(0).tolist()):
        assert seen[token_id] / count == pytest.approx(probability, abs=0.003)


@pytest.mark.parametrize("head", [1, 2, 3, 5])
def test_a_cut_after_the_most_probable_tokens_gives_the_same_samples(
    head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same whether or not the cut is among the most probable tokens."""
    cases = [
        SamplingParams(top_k=2),
        SamplingParams(top_k=4, top_p=0.9),
        SamplingParams(top_p=0.7),
        SamplingParams(top_p=0.97),
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=0.1, top_p=0.8),
    ]
    draws = [i / 97 for i in range(97)]
    chunks = [chunk(params, uniform=u) for params in cases for u in draws]
    rows = LOGITS.repeat(len(chunks), 1)
    by_sorting = sample(rows, chunks)
    monkeypatch.setattr(sampler, "head_width", lambda _: head)
    assert sample(rows, chunks) == by_sorting


def test_penalties_count_prompt_and_output_tokens() -> None:
    history: dict[str, Any] = {
        "history": (4, 0, 0),
        "num_prompt_tokens": 1,
    }  # prompt [4], output [0, 0]
    assert one(SamplingParams(temperature=0, repetition_penalty=4.0), **history).token_id == 1
    assert one(SamplingParams(temperature=0, presence_penalty=9.0), **history).token_id == 4
    greedy_bias = {4: -2.0}  # token 0 leads by 1.0 until its two appearances count
    leads = SamplingParams(temperature=0, logit_bias=greedy_bias)
    assert one(leads, **history).token_id == 0
    counted = SamplingParams(temperature=0, logit_bias=greedy_bias, frequency_penalty=0.6)
    assert one(counted, **history).token_id in {1, 4}


@pytest.mark.parametrize("temperature", [1e-6, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    assert sample(LOGITS.flip(0)[None], [chunk(params)])[0].token_id == 0


def test_more_logprobs_than_the_vocabulary_returns_all_tokens() -> None:
    assert len(one(SamplingParams(temperature=0, top_logprobs=20)).top_logprobs) == len(LOGITS)


def test_tokens_outside_of_a_mask_are_never_sampled() -> None:
    mask = bit_mask([1, 3], num_ids=5)
    assert one(GREEDY, mask=mask).token_id == 1
    assert one(SamplingParams(logit_bias={3: 100.0}), mask=mask).token_id == 3
    assert one(GREEDY, mask=mask, banned=(1,)).token_id == 3
    drawn = {one(SamplingParams(), mask=mask, uniform=u / 50).token_id for u in range(50)}
    assert drawn == {1, 3}
    wide = torch.cat([LOGITS, LOGITS.repeat(8)])  # ids behind the end of the mask
    assert sample(wide[None], [chunk(GREEDY, mask=mask)])[0].token_id == 1
    free, masked = sample(LOGITS.repeat(2, 1), [chunk(GREEDY), chunk(GREEDY, mask=mask)])
    assert (free.token_id, masked.token_id) == (4, 1)


def test_banned_tokens_are_never_sampled() -> None:
    assert one(GREEDY, banned=(4,)).token_id == 0
    assert one(SamplingParams(top_k=1), banned=(4, 0)).token_id == 1


def test_logprobs_come_from_the_unmodified_distribution() -> None:
    params = SamplingParams(temperature=0.3, logit_bias={3: 100.0}, top_logprobs=2)
    sampled = one(params)
    expected = LOGITS.log_softmax(0)
    assert sampled.token_id == 3
    assert sampled.logprob == pytest.approx(float(expected[3]), abs=1e-5)
    assert [t.token_id for t in sampled.top_logprobs] == [4, 0]
    assert sampled.top_logprobs[0].logprob == pytest.approx(float(expected[4]), abs=1e-5)
    assert one(GREEDY).logprob is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_row_with_non_finite_logits_fails_alone(bad: float, everywhere: bool) -> None:
    broken = LOGITS.clone()
    if everywhere:
        broken[:] = bad
    else:
        broken[2] = bad
    kinds = [GREEDY, SamplingParams(), SamplingParams(top_p=0.9, top_logprobs=1)]
    chunks = [chunk(params, uniform=0.3) for params in kinds]
    alone = sample(LOGITS.repeat(3, 1), chunks)
    mixed = sample(torch.stack([LOGITS, broken] * 3), [c for c in chunks for _ in range(2)])
    assert mixed[0::2] == alone
    assert [s.finite for s in mixed[1::2]] == [False] * 3


settings_of_a_row = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.9, 0.1]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(settings_of_a_row, st.floats(0, 1, exclude_max=True), st.integers(0, 999)),
        min_size=1,
        max_size=6,
    )
)
def test_a_row_samples_the_same_token_alone_and_in_a_batch(
    rows: list[tuple[SamplingParams, float, int]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = 3 * torch.randn(1000, 40, generator=generator)
    chunks = [
        chunk(params, uniform=uniform, history=(1, 2, 2), num_prompt_tokens=1)
        for params, uniform, _ in rows
    ]
    logits = torch.stack([pool[i] for *_, i in rows])
    together = sample(logits, chunks)
    alone = [sample(logits[i : i + 1], [c])[0] for i, c in enumerate(chunks)]
    assert together == alone


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0, top_logprobs=1)])
def test_the_best_ids_of_a_decoder_are_taken_as_they_are(params: SamplingParams) -> None:
    best = (torch.tensor([3.0, torch.nan]), torch.tensor([4, 0]))
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan)])
    sampled = sampler.sample(Logits(logits, best), [chunk(params), chunk(params)])
    assert [(s.token_id, s.finite) for s in sampled] == [(4, True), (0, False)]


def test_plain_greedy_rows_do_not_read_the_logits_again() -> None:
    best = (torch.tensor([1.0]), torch.tensor([2]))
    assert sampler.sample(Logits(LOGITS[None], best), [chunk(GREEDY)])[0].token_id == 2
