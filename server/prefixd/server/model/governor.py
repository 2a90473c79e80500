"""How many threads compute, by what other processes leave of the cores.

The threads of a step wait for one another, so one that shares its core with another process delays
all: next to a busy process on two cores, two threads are slower than one. Pure: the time and the
use of the cores come in as arguments.
"""

from math import floor

_CONFIRMATIONS = 2
"""Samples in a row before a thread is dropped: a process that runs for a moment changes nothing."""

_FREE = 0.75
"""How much of a core has to be free before a thread is added for it."""

_HOLD_S, _LONGEST_HOLD_S = 1.0, 32.0
"""How long cores must be free before they are used again. It doubles when they are lost again
within _HOLD_RESET_S, and is reset when they are kept for longer."""

_HOLD_RESET_S = 20.0


class Governor:
    """Chooses between 1 and ``most`` threads; begins with ``most``. Times are in seconds on any
    clock that does not go back."""

    def __init__(self, most: int) -> None:
        self.threads = self._most = most
        self.num_changes = 0
        self._num_short = 0
        self._free_since: float | None = None
        self._raised_at: float | None = None
        self._hold_s = _HOLD_S

    def observe(self, *, now: float, available: float) -> int:
        """Take in how many cores other processes have left since the last call; returns the number
        of threads from now on."""
        wanted = max(1, min(self._most, floor(available + 0.5)))
        if wanted < self.threads:
            self._free_since = None
            self._num_short += 1
            if self._num_short >= _CONFIRMATIONS:
                self._lower(wanted, now)
            return self.threads
        self._num_short = 0
        enough = max(1, min(self._most, floor(available + 1 - _FREE)))
        if enough <= self.threads:
            self._free_since = None
        elif self._free_since is None:
            self._free_since = now
        elif now - self._free_since >= self._hold_s:
            self._change(enough)
            self._raised_at = now
        return self.threads

    def _lower(self, threads: int, now: float) -> None:
        if self._raised_at is not None:
            soon = now - self._raised_at < _HOLD_RESET_S
            longer = min(2 * self._hold_s, _LONGEST_HOLD_S)
            self._hold_s = longer if soon else _HOLD_S
        self._change(threads)

    def _change(self, threads: int) -> None:
        self.threads = threads
        self.num_changes += 1
        self._num_short = 0
        self._free_since = None
