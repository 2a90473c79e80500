"""What proposed tokens cost a step, measured: how many times as long it takes with so many.

With few sequences additional rows cost next to nothing, because a step takes as long as reading the
weights; with many each costs as much as a token. The time is a staircase, not even a monotonic one,
so each number of drafts is measured for itself. Between two that are known it is a straight line,
and beyond the last one it rises by what a row has cost so far, or by ``UNMEASURED`` if that is
less::

    slowdown of     1.3 |                . '     . '  assumed
    8 sequences     1.2 |   x         x          x    measured
                    1.1 | .   ' x . '
                    1.0 x-------------------
                        0   1   3     8  drafts
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from statistics import median

from prefixd.server.engine.step import Step

UNMEASURED = 0.25
"""Cost of a row beyond those that are known, in tokens: that of a step without drafts takes its
time divided by its sequences. It is low, so that a number of drafts which may pay is tried."""

PLAIN_EVERY = 32
"""A step without drafts comes after so many with them: what drafts cost is measured against it."""

FORGOTTEN_AFTER = 512
"""A slowdown that was not measured again for so many steps is forgotten: a number of drafts whose
first step was slow for another reason would never be tried again."""

_SAMPLES = 5


class RowCosts:
    """Times of steps that only decode, by the numbers of sequences and of drafts."""

    def __init__(self) -> None:
        self._staircases: defaultdict[int, _Staircase] = defaultdict(_Staircase)

    def observe(self, step: Step, *, seconds: float) -> None:
        """Take in how long a step took. Those with prompts or prefixes say nothing."""
        rows, drafts = len(step.chunks), step.num_drafts
        if rows and not step.compiles and step.num_tokens == rows + drafts:
            self._staircases[rows].observe(drafts, seconds)

    def needs_plain(self, rows: int) -> bool:
        """Whether the next step of ``rows`` sequences should have no drafts, to be measured."""
        return self._staircases[rows].needs_plain

    def slowdown(self, rows: int, drafts: int) -> float:
        """How many times as long a step of ``rows`` sequences takes with ``drafts`` drafts; at
        least 1."""
        return max(1.0, self._staircases[rows].slowdown(drafts, unmeasured=UNMEASURED / rows))


class _Staircase:
    """What drafts cost steps of one number of sequences."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=_SAMPLES)
        self._num_steps = self._last_plain = 0
        self._samples: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._measured: dict[int, int] = {}  # in which step
        self._slowdowns = {0: 1.0}
        self._known = [0]

    @property
    def needs_plain(self) -> bool:
        return not self._plain or self._num_steps - self._last_plain >= PLAIN_EVERY

    def observe(self, drafts: int, seconds: float) -> None:
        self._num_steps += 1
        if not drafts:
            self._plain.append(seconds)
            self._last_plain = self._num_steps
        elif self._plain:
            if drafts not in self._slowdowns:
                insort(self._known, drafts)
            self._samples[drafts].append(seconds / max(median(self._plain), 1e-9))
            self._slowdowns[drafts] = median(self._samples[drafts])
            self._measured[drafts] = self._num_steps
        if self._num_steps % FORGOTTEN_AFTER == 0:
            self._forget(before=self._num_steps - FORGOTTEN_AFTER)

    def _forget(self, *, before: int) -> None:
        for drafts in [drafts for drafts, step in self._measured.items() if step <= before]:
            del self._samples[drafts], self._measured[drafts], self._slowdowns[drafts]
            self._known.remove(drafts)

    def slowdown(self, drafts: int, *, unmeasured: float) -> float:
        known, slowdowns = self._known, self._slowdowns
        at = bisect_left(known, drafts)
        if at == len(known):
            last = known[-1]
            if last:
                unmeasured = min(unmeasured, max(0.0, slowdowns[last] - 1.0) / last)
            return slowdowns[last] + unmeasured * (drafts - last)
        above = known[at]
        if above == drafts:
            return slowdowns[above]
        below = known[at - 1]
        part = (drafts - below) / (above - below)
        return slowdowns[below] + part * (slowdowns[above] - slowdowns[below])
