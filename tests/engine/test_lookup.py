"""What prompt lookup proposes, and when it pays."""

import pytest

from prefixd.server.engine import lookup
from prefixd.server.engine.lookup import MAX_DRAFTS, PROBE_EVERY, Acceptance, Lookup, NgramIndex
from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.row_costs import PLAIN_EVERY, UNMEASURED, RowCosts
from prefixd.server.engine.step import Chunk, Draft, Step


def test_the_longest_match_wins_and_the_last_occurrence_of_it() -> None:
    #        0  1  2  3  4  5  6  7  8  9 10 11 12
    tokens = [1, 2, 3, 7, 1, 2, 3, 8, 9, 2, 3, 5, 1]
    assert NgramIndex().find([*tokens, 2, 3]) == (3, 7)
    assert NgramIndex().find([*tokens, 9, 2]) == (2, 10)
    assert NgramIndex().find([*tokens, 4]) is None
    assert NgramIndex().find([5]) is None
    assert NgramIndex().find([5, 5]) is None


def test_the_index_grows_with_the_text_and_reads_no_token_twice() -> None:
    class Watched(list[int]):
        reads = 0

        def __getitem__(self, key):
            Watched.reads += 1
            return super().__getitem__(key)

    tokens, index = Watched([3, 4, 5, 6] * 50), NgramIndex()
    assert index.find(tokens) == (4, 196)
    tokens.append(3)
    Watched.reads = 0
    assert index.find(tokens) == (4, 197)
    assert Watched.reads <= 6
    fresh = NgramIndex()
    assert fresh.find(list(tokens)) == (4, 197)


def test_a_long_prompt_is_indexed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_MAX_INDEXED", 10)
    tokens, index = [1, 2, 3] * 8, NgramIndex()
    assert [index.find(tokens) for _ in range(3)] == [None, None, (4, 21)]


@pytest.mark.parametrize(
    ("start", "proposed"), [(1, [6, 7, 8, 6, 7]), (3, [8, 8, 8, 8, 8]), (2, [7, 8, 7, 8, 7])]
)
def test_a_proposal_repeats_a_short_cycle(start: int, proposed: list[int]) -> None:
    assert lookup.continuation([5, 6, 7, 8], start, 5) == proposed


def test_the_number_of_drafts_follows_what_was_accepted() -> None:
    acceptance = Acceptance()
    for _ in range(10):
        acceptance.observe(4, proposed=MAX_DRAFTS, accepted=MAX_DRAFTS)
    assert acceptance.num_worth(4, 0.5) == MAX_DRAFTS
    assert acceptance.num_worth(4, 0.97) < MAX_DRAFTS
    for _ in range(30):
        acceptance.observe(4, proposed=4, accepted=0)
    assert acceptance.num_worth(4, 0.5) == 0
    assert acceptance.num_worth(2, 0.3) > 0, "matches of other lengths count apart"


def test_a_sequence_that_never_accepts_proposes_one_token_now_and_then() -> None:
    one, tokens = Lookup(), [1, 2] * 20
    lengths = []
    for _ in range(4 * PROBE_EVERY):
        proposed = one.propose(tokens, least=0.9, limit=8)
        lengths.append(len(proposed))
        if proposed:
            one.observe(proposed=len(proposed), accepted=0)
        tokens += [tokens[-2]]
    assert sum(lengths) == 4
    assert max(lengths) == 1


def test_a_limit_of_zero_proposes_nothing() -> None:
    assert Lookup().propose([1, 2] * 9, least=0.02, limit=0) == []


def step_of(rows: int, drafts: int = 0) -> Step:
    step = Step()
    for number in range(rows):
        chunk = Chunk(number, [1], 0, (1,), sampling=SamplingParams(temperature=0))
        if number < drafts:
            chunk.draft = Draft([2], [0.0])
        step.chunks.append(chunk)
    return step


def costs_of(rows: int, *, seconds: float, extra: float) -> RowCosts:
    """Measured: a step of ``rows`` takes ``seconds``, and ``extra`` for each draft."""
    costs = RowCosts()
    for drafts in (0, rows) * 10:
        costs.observe(step_of(rows, drafts), num_new=rows, seconds=seconds + extra * drafts)
    return costs


def test_rows_that_cost_nothing_pay_with_any_acceptance_and_dear_ones_with_none() -> None:
    assert RowCosts().least_probability(4) == UNMEASURED
    assert costs_of(1, seconds=0.0106, extra=0.0).least_probability(1) < 0.05
    # 32 rows of 27 ms, one more 0.6 ms: a token takes 0.84 ms without drafts.
    assert 0.4 < costs_of(32, seconds=0.027, extra=0.0006).least_probability(32) < 0.75
    assert costs_of(32, seconds=0.027, extra=0.003).least_probability(32) > 0.9


def test_a_step_without_drafts_is_measured_first_and_again() -> None:
    costs = RowCosts()
    assert costs.needs_plain(2)
    costs.observe(step_of(2), num_new=2, seconds=0.01)
    for _ in range(PLAIN_EVERY):
        assert not costs.needs_plain(2)
        costs.observe(step_of(2, 2), num_new=4, seconds=0.01)
    assert costs.needs_plain(2)


def test_steps_with_prompts_say_nothing_about_rows() -> None:
    costs, step = RowCosts(), step_of(2)
    step.chunks[1].tokens = [1, 2, 3]
    costs.observe(step, num_new=2, seconds=9.0)
    assert costs.needs_plain(2)
