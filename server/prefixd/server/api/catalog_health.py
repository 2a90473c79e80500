"""Whether the catalog responds, as a probe at intervals found it: pure state.

``/health/ready`` and the circuit breaker of ``catalog_calls`` read it on the event loop, so nothing
here waits. ``serve`` runs the probe.
"""

import time
from collections.abc import Callable

import structlog

_JUST_NOW_S = 1e-9

log = structlog.get_logger("prefixd")

PROBE_TIMEOUT_S = 2.0
"""A probe that has not ended after this time has failed, in seconds."""

NOT_READY_AFTER_S = 5.0
"""The server is not ready once the probe has failed for this long, in seconds."""


class ProbeState:
    """The results of one probe, written by the thread that runs it and read by any."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begun: float | None = None
        self._failing_since: float | None = None

    def begin(self) -> None:
        """A probe begins."""
        self._begun = self._now()

    def succeed(self) -> None:
        """It succeeded."""
        self._begun = self._failing_since = None

    def fail(self) -> None:
        """It failed."""
        if self._failing_since is None:
            self._failing_since = self._begun
        self._begun = None

    @property
    def failed_for_s(self) -> float:
        """How long it has failed, in seconds; 0 when it works."""
        now, since, begun = self._now(), self._failing_since, self._begun
        if since is None and begun is not None and now - begun > PROBE_TIMEOUT_S:
            since = begun
        return 0.0 if since is None else max(now - since, _JUST_NOW_S)


class CatalogHealth:
    """Whether the catalog can be read, and written to: SQLite can be locked for writers alone."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self.reads = ProbeState(now=now)
        self.writes = ProbeState(now=now)
        self._was_refused = (False, False)

    @property
    def reads_refused(self) -> bool:
        """Whether the circuit breaker is open for all calls."""
        return self.reads.failed_for_s > 0

    @property
    def writes_refused(self) -> bool:
        """Whether the circuit breaker is open for calls that write."""
        return self.reads_refused or self.writes.failed_for_s > 0

    @property
    def trouble(self) -> str | None:
        """Why the server is not ready, or None."""
        unread_s, unwritten_s = self.reads.failed_for_s, self.writes.failed_for_s
        if unread_s >= NOT_READY_AFTER_S:
            return f"the catalog has not responded for {unread_s:.0f} s"
        if unwritten_s >= NOT_READY_AFTER_S:
            return f"the catalog has been locked by another process for {unwritten_s:.0f} s"
        return None

    def report(self) -> None:
        """Log each change of the circuit breaker; to be called at intervals."""
        refused = (self.reads_refused, self.writes_refused)
        if refused != self._was_refused:
            self._was_refused = refused
            state = "closed"
            if any(refused):
                state = "open" if refused[0] else "open for writes"
            level = log.warning if any(refused) else log.info
            level("the circuit breaker of the catalog changed", state=state)
