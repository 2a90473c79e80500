"""What prompt lookup proposes, and how likely it is right."""

import pytest

from prefixd.server.engine import lookup
from prefixd.server.engine.lookup import (
    FORGOTTEN_AFTER,
    LONGEST,
    Acceptance,
    Lookup,
    NgramIndex,
)


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
    assert index.find(tokens) == (LONGEST, 196)
    tokens.append(3)
    Watched.reads = 0
    assert index.find(tokens) == (LONGEST, 197)
    assert Watched.reads <= 6 + 2 * LONGEST
    fresh = NgramIndex()
    assert fresh.find(list(tokens)) == (LONGEST, 197)


@pytest.mark.parametrize("same", [*range(2, LONGEST + 4), 40])
def test_a_match_is_as_long_as_what_is_the_same(same: int) -> None:
    run = list(range(100, 100 + same))
    tokens = [1, *run, 2, 3, *run]
    assert NgramIndex().find(tokens) == (min(same, LONGEST), 1 + same)
    assert NgramIndex().find(tokens[1:]) == (min(same, LONGEST), same), "from the first token on"


def test_a_long_prompt_is_indexed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_MAX_INDEXED", 10)
    tokens, index = [1, 2, 3] * 8, NgramIndex()
    assert [index.find(tokens) for _ in range(3)] == [None, None, (LONGEST, 21)]


@pytest.mark.parametrize(
    ("start", "proposed"), [(1, [6, 7, 8, 6, 7]), (3, [8, 8, 8, 8, 8]), (2, [7, 8, 7, 8, 7])]
)
def test_a_proposal_repeats_a_short_cycle(start: int, proposed: list[int]) -> None:
    assert lookup.continuation([5, 6, 7, 8], start, 5) == proposed


def test_the_probability_follows_what_was_accepted_after_matches_of_that_length() -> None:
    acceptance = Acceptance()
    before = {length: acceptance.probability(length, at=20) for length in range(2, LONGEST + 1)}
    assert list(before.values()) == sorted(before.values()), "longer matches are likelier right"
    for _ in range(10):
        acceptance.observe(4, at=20, proposed=8, accepted=8)
    assert acceptance.probability(4, at=20) > 0.97
    for _ in range(30):
        acceptance.observe(4, at=20, proposed=4, accepted=0)
    assert acceptance.probability(4, at=20) < 0.1
    del before[4]
    assert before == {length: acceptance.probability(length, at=20) for length in before}


def test_what_was_observed_is_forgotten_when_it_is_not_tried_again() -> None:
    acceptance = Acceptance()
    before = acceptance.probability(8, at=20)
    for _ in range(20):
        acceptance.observe(8, at=20, proposed=1, accepted=0)
    assert acceptance.probability(8, at=20 + FORGOTTEN_AFTER) < 0.15
    assert acceptance.probability(8, at=21 + FORGOTTEN_AFTER) == before
    acceptance.observe(8, at=30 + FORGOTTEN_AFTER, proposed=1, accepted=0)
    assert acceptance.probability(8, at=31 + FORGOTTEN_AFTER) < before


def test_a_proposal_is_what_followed_and_its_result_counts_for_its_match() -> None:
    one = Lookup()
    assert Lookup().find([1, 2, 3]) == 0.0
    tokens = [5, 6, 7, 8, 9, 5, 6]
    expected = Lookup().find(tokens)
    assert one.find(tokens) == expected > 0.0
    assert one.propose(tokens, 2) == [7, 8]
    one.observe(proposed=2, accepted=0)
    assert 0.0 < one.find(tokens) < expected
