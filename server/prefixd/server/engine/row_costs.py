"""What one more row costs a step, measured: whether proposed tokens are worth verifying.

A step of B sequences that decode takes a time without drafts and a longer one with D of them; the
difference divided by D is the cost of a row. With few sequences it is next to nothing, because a
step takes as long as reading the weights; with many it is what each of them costs::

    a draft pays   <=>   probability that it is accepted * time of a token > cost of a row
    time of a token  =   time of a step / tokens that it gives
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

_SMOOTHING = 0.9


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
        self._token_times: dict[int, tuple[float, float]] = {}

    def observe(self, step: Step, *, num_new: int, seconds: float) -> None:
        """Take in how long a step took that gave ``num_new`` tokens. Those with prompts or prefixes
        say nothing."""
        rows, drafts = len(step.chunks), step.num_drafts
        if not rows or step.compiles or step.num_tokens != rows + drafts:
            return
        size = rows.bit_length()
        if not drafts:
            self._plain[rows].append(seconds)
            self._since_plain[rows] = 0
        else:
            self._since_plain[rows] += 1
            if drafts * _LEAST_DRAFTED >= rows and self._plain[rows]:
                cost = (seconds - median(self._plain[rows])) / drafts
                self._costs[size].append(max(0.0, cost))
        total, tokens = self._token_times.get(size, (0.0, 0.0))
        self._token_times[size] = _SMOOTHING * total + seconds, _SMOOTHING * tokens + num_new

    def needs_plain(self, rows: int) -> bool:
        """Whether the next step of ``rows`` sequences should have no drafts, to be measured."""
        return not self._plain[rows] or self._since_plain[rows] >= PLAIN_EVERY

    def least_probability(self, rows: int) -> float:
        """How likely a draft must be accepted to pay, in a step of ``rows`` sequences."""
        costs = self._costs[rows.bit_length()]
        if not costs:
            return UNMEASURED
        seconds, tokens = self._token_times[rows.bit_length()]
        return min(_MOST, max(_LEAST, median(costs) * tokens / max(seconds, 1e-9)))
