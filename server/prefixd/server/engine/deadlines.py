"""What runs out of time, and when."""

import heapq
from collections.abc import Iterator

from prefixd.server.engine.request import FinishReason
from prefixd.server.engine.sequence import Sequence

_FEWEST = 256
"""Moments that are never too many to keep."""


class Deadlines:
    """Deadlines of requests, and the patience of the queue with those that have not started."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, FinishReason, Sequence]] = []
        self._most = _FEWEST

    def add(self, sequence: Sequence, *, max_queue_wait_s: float | None) -> None:
        """Note when a sequence that has just arrived runs out of time, if it ever does."""
        for patience, reason in (
            (sequence.request.timeout_s, FinishReason.TIMEOUT),
            (max_queue_wait_s, FinishReason.SHED),
        ):
            if patience is not None:
                moment = sequence.arrived + patience
                heapq.heappush(self._heap, (moment, sequence.seq_id, reason, sequence))
        if len(self._heap) > self._most:
            self._forget_finished()

    @property
    def next(self) -> float | None:
        """When there is something due, at the earliest."""
        return self._heap[0][0] if self._heap else None

    def due(self, *, now: float) -> Iterator[tuple[Sequence, FinishReason, str]]:
        """Living sequences to end now, and what to tell their callers. To be ended one by one, as
        they come."""
        while self._heap and self._heap[0][0] <= now:
            _, _, reason, sequence = heapq.heappop(self._heap)
            if sequence.finished:
                continue
            if reason is FinishReason.TIMEOUT:
                error = (
                    f"the request's timeout of {sequence.request.timeout_s:g} s passed after "
                    f"{sequence.num_output} tokens of output"
                )
                yield sequence, reason, error
            elif sequence.started is None:
                waited = now - sequence.arrived
                error = f"the server is full: the request waited {waited:.0f} s without a start"
                yield sequence, reason, error

    def _forget_finished(self) -> None:
        """What ended in time would be kept, with all its tokens, until a moment years away."""
        self._heap = [item for item in self._heap if not item[-1].finished]
        heapq.heapify(self._heap)
        self._most = max(_FEWEST, 2 * len(self._heap))
