"""Smaller steps for a while, after the device had no room for one."""

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.step import Step

_GROWS_EVERY = 32
"""Steps that have to go well before the limits double again."""


class OomBackoff:
    """How many sequences may run and how many tokens one part of a step may have, now."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._most_running = self.max_running = config.max_running
        self._most_chunk = self.max_chunk = config.max_prefill_chunk
        self._went_well = 0
        self.num_shrinks = 0

    def shrink(self, step: Step) -> bool:
        """Halve what of ``step`` can be halved; False when it was as small as can be.

        What it carried one of says nothing of how many there may be. And what it was to save is
        gone: the next step needs no room for that.
        """
        rows = len(step.chunks)
        compiled = sum(part.stop - part.start for part in step.compiles)
        longest = max([compiled, *(len(chunk.tokens) for chunk in step.chunks)])
        self._went_well = 0
        self.num_shrinks += 1
        if rows > 1:
            self.max_running = min(self.max_running, rows // 2)
        if longest > 1:
            self.max_chunk = min(self.max_chunk, longest // 2)
        return rows > 1 or longest > 1 or bool(step.saves)

    def step_went_well(self) -> None:
        """Count one towards the old limits."""
        self._went_well += 1
        if self._went_well % _GROWS_EVERY == 0:
            self.max_running = min(self._most_running, 2 * self.max_running)
            self.max_chunk = min(self._most_chunk, 2 * self.max_chunk)
