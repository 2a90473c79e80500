"""The order in which the writers of one process get a SQLite file.

SQLite's own wait polls, and under load one of many writers may never see the file unlocked. A plain
lock has no order: a thread that writes several times gets it again before those that wait.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import TimeoutError as PoolTimeout


class WriterTurns:
    """One writer at a time; the others wait in order of arrival, each up to ``timeout_s`` seconds.

    Relaxed writers, which are short and wait for no disk, have a queue of their own. While both
    kinds wait, they alternate: a request that is only counted waits for one other transaction,
    however many changes wait.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._taken = False
        self._last_relaxed = False
        self._queues: dict[bool, deque[threading.Event]] = {True: deque(), False: deque()}

    @property
    def num_waiting(self) -> int:
        """Writers that wait for their turn."""
        return sum(map(len, self._queues.values()))

    @contextmanager
    def take(self, *, relaxed: bool) -> Iterator[None]:
        """Write inside the block. Raises sqlalchemy.exc.TimeoutError."""
        turn = threading.Event()
        with self._lock:
            if self._taken:
                self._queues[relaxed].append(turn)
            else:
                self._taken, self._last_relaxed = True, relaxed
                turn.set()
        if not turn.wait(self._timeout_s):
            self._leave(turn, relaxed=relaxed)
        try:
            yield
        finally:
            self._pass_on()

    def _leave(self, turn: threading.Event, *, relaxed: bool) -> None:
        """Raise, unless the turn came at the same moment."""
        with self._lock:
            if not turn.is_set():
                self._queues[relaxed].remove(turn)
                raise PoolTimeout(f"other writers had the database for {self._timeout_s:g} s")

    def _pass_on(self) -> None:
        with self._lock:
            relaxed = not self._last_relaxed
            if not self._queues[relaxed]:
                relaxed = not relaxed
            self._taken = bool(self._queues[relaxed])
            if self._taken:
                self._last_relaxed = relaxed
                self._queues[relaxed].popleft().set()
