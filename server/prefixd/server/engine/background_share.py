"""How much the background class may add to a step next to the foreground, by measured times.

It may prolong a step by ``SLOWDOWN``. What a step of so many decode rows takes without it is
measured by leaving it out of every ``PLAIN_EVERY``-th; what a token of it adds is an estimate that
each step with it moves a little up or down, until half of them take longer and half less::

    cost of a token   0.02 |
    (1 is the time         |x
    of a step without      |  x x     x   x
    the class)        0.01 |      x x   x   x x      too high, too low, ...
                           +-------------------- steps

So one slow step changes little, as on a machine where other processes run, and a device that
becomes slower is noticed within some steps.

A share of few tokens is taken in every third step, for all three: the first additional row of a
step may cost as much as several, where a kernel computes rows in tiles, and a stream that sees one
longer gap in three keeps its pace. So the class advances even where one token prolongs a step by
more than ``SLOWDOWN``, in every so many steps, and the average is kept.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from prefixd.server.engine.step import Step

SLOWDOWN = 0.08
"""By how much of its time the background class may prolong a step. It holds for a median step; the
mean is about a tenth, since some prompts and first rows take longer."""

PLAIN_EVERY = 8
"""A step without the class comes after so many with it."""

_OUTDATED_AFTER = 64
"""Steps after which a time without the class is measured again."""

_FEW, _TOGETHER = 4, 3
"""Below _FEW tokens a step the shares of _TOGETHER steps are taken in one."""

_CHANGE = 1.05
_LEAST, _MOST = 1e-5, 5.0
_UNMEASURED = 0.25
"""Cost of a token before the first step with it, divided by the rows of the step."""


@dataclass(slots=True)
class _Rows:
    """Measurements of steps with one number of decode rows of the foreground."""

    cost: float
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    num_since_plain: int = 0
    plain_at: int = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a step with ``tokens`` of the background class."""
        self.num_since_plain += 1
        if self.plain:
            added = seconds / max(median(self.plain), 1e-9) - 1
            change = _CHANGE if added > self.cost * tokens else 1 / _CHANGE
            self.cost = min(max(self.cost * change, _LEAST), _MOST)


class BackgroundShare:
    """Measures steps, and bounds the background tokens of the next one."""

    def __init__(self) -> None:
        self._by_rows: dict[int, _Rows] = {}
        self._num_steps = 0
        self._carry = 0.0
        self._num_carried = 0

    def observe(self, step: Step, seconds: float) -> None:
        """Take in how long it took from the step before to this one. Those with prompts, drafts or
        prefixes say nothing."""
        background = step.background_tokens
        rows = len(step.chunks) if step.num_foreground is None else step.num_foreground
        if not rows or step.compiles or step.num_tokens != rows + background:
            return
        self._num_steps += 1
        measured = self._of(rows)
        if background:
            measured.observe(background, seconds)
            return
        if self._is_outdated(measured):
            measured.plain.clear()
        measured.plain.append(seconds)
        measured.num_since_plain, measured.plain_at = 0, self._num_steps

    def tokens(self, step: Step) -> int:
        """The most tokens that may be added to ``step``, which has all of its foreground."""
        rows = sum(len(chunk.tokens) == 1 for chunk in step.chunks)
        num_others = step.num_tokens - step.num_drafts - rows
        if not rows:  # no stream waits, only the end of prompts
            return int(SLOWDOWN * num_others)
        measured = self._of(rows)
        if not num_others and not step.num_drafts and self._needs_plain(measured):
            return 0
        share = SLOWDOWN / measured.cost
        self._carry += share
        self._num_carried += 1
        if share < _FEW and self._num_carried < _TOGETHER:
            return 0
        tokens = int(self._carry)
        self._carry -= tokens
        self._num_carried = 0 if tokens else self._num_carried
        return tokens

    def _of(self, rows: int) -> _Rows:
        """The measurements of so many rows; at first with the cost of the nearest number."""
        measured = self._by_rows.get(rows)
        if measured is None:
            cost = _UNMEASURED / rows
            if self._by_rows:
                cost = self._by_rows[min(self._by_rows, key=lambda other: abs(other - rows))].cost
            measured = self._by_rows[rows] = _Rows(cost)
        return measured

    def _needs_plain(self, measured: _Rows) -> bool:
        is_due = measured.num_since_plain >= PLAIN_EVERY
        return is_due or not measured.plain or self._is_outdated(measured)

    def _is_outdated(self, measured: _Rows) -> bool:
        return self._num_steps - measured.plain_at > _OUTDATED_AFTER
