"""How many proposed tokens each sequence of a step verifies: decided for all of them together.

The time of a step by its rows is a staircase: kernels compute rows in tiles, so one more row is
nearly free or costs as much as the next eight. One draft alone may not be worth a tile that several
share, and a step takes the same time for all of its sequences, those without drafts too. So drafts
are added one by one, each where it helps most, and every number of them is weighed by what it does
to the speeds of the sequences, as the sum of their logarithms::

    expected tokens of sequence i    t[i] = 1 + p[i] + p[i]^2 + ...    a term for each of its drafts
    worth of D drafts                sum(log t[i]) - sequences * log(slowdown of the step by D)

So a sequence that gets twice as fast is worth as much as slowing down another one to half.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import log

LEAST_GAIN = 0.02
"""A draft is considered where it adds so much to the logarithm of its sequence's speed."""

LEAST_WORTH, _LEAST_WORTH_OF = 0.05, 8
"""Drafts have to be worth so much for each sequence of the step, up to so many: probabilities and
times are estimates, and to verify drafts costs a little outside of the step too. One of many
sequences can be worth that alone, where rows are free."""

_LOOKAHEAD = 16
"""So many drafts more than the best number are weighed: two tiles, of which the first may cost most
of its time with its first row."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that may have at most ``limit`` drafts: each is accepted with ``probability``, if
    those before it are."""

    probability: float
    limit: int


def least_worth(rows: int) -> float:
    """What drafts of a step of ``rows`` sequences have to be worth at least."""
    return min(rows, _LEAST_WORTH_OF) * LEAST_WORTH


def is_worth_waiting(candidate: Candidate, *, rows: int, slowdown: Callable[[int], float]) -> bool:
    """Whether a sequence of ``rows`` runs every other step with drafts, instead of every step
    without: so that it takes twice the time for the tokens that are expected."""
    tokens = reached = 1.0
    for drafts in range(1, candidate.limit + 1 if candidate.probability > 0.5 else 1):
        reached *= candidate.probability
        tokens += reached
        if log(tokens / 2) - rows * log(slowdown(drafts)) > least_worth(rows):
            return True
    return False


def plan_drafts(
    candidates: Sequence[Candidate],
    *,
    rows: int,
    budget: int,
    slowdown: Callable[[int], float],
) -> list[int]:
    """The drafts of each candidate in a step of ``rows`` sequences, at most ``budget`` in
    all. ``slowdown(drafts)`` is how many times as long the step takes with so many, at least 1."""
    order: list[int] = []
    worth, best, num_best = 0.0, least_worth(rows), 0
    for index, gain in _by_gain(candidates):
        if len(order) >= min(budget, num_best + _LOOKAHEAD):
            break
        order.append(index)
        worth += gain
        value = worth - rows * log(slowdown(len(order)))
        if value > best:
            best, num_best = value, len(order)
    counts = [0] * len(candidates)
    for index in order[:num_best]:
        counts[index] += 1
    return counts


def _by_gain(candidates: Sequence[Candidate]) -> Iterator[tuple[int, float]]:
    """The candidates, each as often as it may have a draft, with what that adds to the logarithm of
    its speed: the largest first."""
    counts = [0] * len(candidates)
    tokens, reached = [1.0] * len(candidates), [1.0] * len(candidates)
    heap = [
        (-log(1.0 + each.probability), index)
        for index, each in enumerate(candidates)
        if each.limit > 0
    ]
    heapify(heap)
    while heap and -heap[0][0] >= LEAST_GAIN:
        gain, index = heap[0]
        yield index, -gain
        each = candidates[index]
        counts[index] += 1
        reached[index] *= each.probability
        tokens[index] += reached[index]
        if counts[index] < each.limit:
            more = log(1.0 + reached[index] * each.probability / tokens[index])
            heapreplace(heap, (-more, index))
        else:
            heappop(heap)
