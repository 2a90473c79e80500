"""How much the background class may add to a step next to the foreground, by measured times.

A step with it takes at most 1 + ``SLOWDOWN`` times as long as one without it. What a step of so
many decode rows takes without it is measured by leaving it out now and then, and what it adds, by
its tokens, whenever it is there (``row_costs``)::

    16 rows alone        |################|                 every 32nd step
    with 5 more tokens   |################|#|   1.06        measured: more are tried
    with 9 more tokens   |################|##|  1.13        measured: too many

Where even one token takes too long, it waits until the steps without it have made up for that: so
the class always advances, and the average is kept.
"""

from prefixd.server.engine.row_costs import RowCosts
from prefixd.server.engine.step import Step

SLOWDOWN = 0.1
"""By how much of its time the background class may prolong a step."""


class BackgroundShare:
    """Measures steps, and bounds the background tokens of the next one."""

    def __init__(self) -> None:
        self._costs = RowCosts()
        self._credit = 0.0

    def observe(self, step: Step, seconds: float) -> None:
        """Take in how long it took from the step before to this one. Those with prompts, drafts or
        prefixes say nothing."""
        background = step.background_tokens
        rows = len(step.chunks) if step.num_foreground is None else step.num_foreground
        if rows and not step.compiles and step.num_tokens == rows + background:
            self._costs.record(rows, background, seconds)

    def tokens(self, step: Step) -> int:
        """The most tokens that may be added to ``step``, which has all of its foreground."""
        rows = sum(len(chunk.tokens) == 1 for chunk in step.chunks)
        num_others = step.num_tokens - step.num_drafts - rows
        if not rows:  # no stream waits, only the end of prompts
            return int(SLOWDOWN * num_others)
        if not num_others and not step.num_drafts and self._costs.needs_plain(rows):
            return 0
        most = self._costs.most(rows, slowdown=1 + SLOWDOWN)
        if most:
            return most
        cost = self._costs.slowdown(rows, 1) - 1
        self._credit += SLOWDOWN
        if self._credit < cost:
            return 0
        most = max(1, self._costs.most(rows, slowdown=1 + self._credit))
        self._credit = 0.0
        return most
