"""Whether steps come along: the watchdog, and how often the loop may be started again."""

from collections import deque

_FAILURES_IN_A_ROW = 8
_FAILURES_FORGOTTEN_S = 30.0
_RESTARTS, _RESTARTS_WITHIN_S = 5, 60.0


class Watchdog:
    """Told by the engine's thread, asked by others. Times are in seconds, on one clock."""

    def __init__(self, *, watchdog_s: float) -> None:
        self._watchdog_s = watchdog_s
        self._turn_began: float | None = None
        self._failures = 0
        self._last_failure = 0.0
        self._restarts: deque[float] = deque(maxlen=_RESTARTS)

    def turn_began(self, *, now: float) -> None:
        """The loop has something to look at."""
        self._turn_began = now

    def turn_ended(self) -> None:
        """And is through with it."""
        self._turn_began = None

    def step_went_well(self) -> None:
        """The device works."""
        self._failures = 0

    def step_failed(self, *, now: float) -> None:
        """Perhaps it does not."""
        self._failures += 1
        self._last_failure = now

    def may_restart(self, *, now: float) -> bool:
        """Whether the loop is to go on after a failure of its own: not when it keeps failing."""
        self._turn_began = None
        recent = [moment for moment in self._restarts if now - moment < _RESTARTS_WITHIN_S]
        self._restarts.append(now)
        return len(recent) < _RESTARTS

    def trouble(self, *, now: float) -> str | None:
        """What is wrong, in a sentence; None when nothing is.

        Steps that failed are forgotten after a while: with nothing sent here, none would go well.
        """
        began = self._turn_began
        if began is not None and now - began > self._watchdog_s:
            return f"no step has ended for {now - began:.0f} s"
        if (
            self._failures >= _FAILURES_IN_A_ROW
            and now - self._last_failure < _FAILURES_FORGOTTEN_S
        ):
            return f"the last {self._failures} steps failed"
        return None
