"""What one more row costs a step, measured: whether proposed tokens are worth verifying.

A step of B sequences that decode takes a time without drafts and a longer one with D of them; the
difference divided by D is the cost of a row. With few sequences it is next to nothing, because a
step takes as long as reading the weights; with many it is what each of them costs::

    a draft pays   <=>   probability that it is accepted * time of a token > cost of a row
    time of a token  =   time of a step without drafts / B

Steps with drafts would be the wrong measure of a token: the worse their drafts pay, the longer
their tokens take, and the better the next ones would seem to pay.
"""

from collections import defaultdict, deque
from statistics import median

from prefixd.server.engine.step import Step

UNMEASURED = 0.5
"""Least probability of a draft before a row's cost is known."""

_LEAST, _MOST = 0.02, 0.95
"""Bounds of it: a row is never free, and a draft that is nearly certain is always tried, so that
its cost is measured."""

PLAIN_EVERY = 32
"""A step without drafts comes after so many with them: what rows cost is measured against it."""

_PLAIN_SAMPLES, _COST_SAMPLES = 3, 15
_LEAST_DRAFTED = 8
"""A step measures the cost of a row when it has a draft for so many sequences at least."""


class RowCosts:
    """Times of steps that only decode, by the number of sequences: exact for steps without drafts,
    in powers of two for the rest."""

    def __init__(self) -> None:
        self._plain: defaultdict[int, deque[float]] = defaultdict(
            lambda: deque(maxlen=_PLAIN_SAMPLES)
        )
        self._since_plain: defaultdict[int, int] = defaultdict(int)
        self._costs: defaultdict[int, deque[float]] = defaultdict(
            lambda: deque(maxlen=_COST_SAMPLES)
        )

    def observe(self, step: Step, *, seconds: float) -> None:
        """Take in how long a step took. Those with prompts or prefixes say nothing."""
        rows, drafts = len(step.chunks), step.num_drafts
        if not rows or step.compiles or step.num_tokens != rows + drafts:
            return
        if not drafts:
            self._plain[rows].append(seconds)
            self._since_plain[rows] = 0
        else:
            self._since_plain[rows] += 1
            if drafts * _LEAST_DRAFTED >= rows and self._plain[rows]:
                cost = (seconds - median(self._plain[rows])) / drafts
                self._costs[rows.bit_length()].append(max(0.0, cost))

    def needs_plain(self, rows: int) -> bool:
        """Whether the next step of ``rows`` sequences should have no drafts, to be measured."""
        return not self._plain[rows] or self._since_plain[rows] >= PLAIN_EVERY

    def least_probability(self, rows: int) -> float:
        """How likely a draft must be accepted to pay, in a step of ``rows`` sequences."""
        costs, plain = self._costs[rows.bit_length()], self._plain[rows]
        if not costs or not plain:
            return UNMEASURED
        token_s = max(median(plain), 1e-9) / rows
        return min(_MOST, max(_LEAST, median(costs) / token_s))
