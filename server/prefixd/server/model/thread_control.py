"""The number of threads of the steps: fixed, or governed by how busy the cores are.

The native decoder needs no governor: it leaves out threads itself, within milliseconds.
"""

import os
import resource
import threading
import time
from pathlib import Path

from prefixd.server.engine.step import ThreadUse
from prefixd.server.model.governor import Governor

_STAT = Path("/proc/stat")
_WINDOW_S = 0.2
"""Time between two looks at the cores: the system counts in hundredths of a second."""

_IDLE_S = 1.0
"""After a pause of this length between steps, the use of the cores before it says nothing."""


class CoreUse:
    """Time that other processes spent on the cores which this one may use."""

    def __init__(self) -> None:
        self._names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        # Processes of lower priority than this one hardly delay it.
        self._includes_nice = os.getpriority(os.PRIO_PROCESS, 0) > 0
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")

    @property
    def cores(self) -> int:
        """How many there are."""
        return len(self._names)

    def others_s(self) -> float:
        """Seconds so far, summed over the cores; raises OSError where the system does not tell."""
        ticks = 0
        for line in _STAT.read_text().splitlines():
            name, *counts = line.split()
            if name in self._names:
                user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, counts[:8])
                ticks += user + system + irq + soft_irq + steal + nice * self._includes_nice
        return ticks * self._tick_s - time.process_time()


class ThreadControl:
    """Says before each step how many threads may compute it. Used by one thread."""

    def __init__(self, threads: int, *, governed: bool) -> None:
        """``threads``: the number, or the largest where it is ``governed``."""
        self._governor = Governor(threads)
        self._use = CoreUse() if governed and threads > 1 and _STAT.exists() else None
        self._looked_at, self._others_s = 0.0, 0.0
        self._stepped_at = 0.0
        self._is_named = False
        self._switches = 0
        self._late_steps = 0

    def before_step(self) -> int:
        """The number of threads for the next step."""
        if not self._is_named:
            self._is_named = True
            _name_thread()
        self._switches = _switches()
        now = time.monotonic()
        if self._use is not None and now - self._looked_at >= _WINDOW_S:
            self._look(self._use, now)
        self._stepped_at = now
        return self._governor.threads

    def after_step(self) -> ThreadUse:
        """Count a step that has ended."""
        self._late_steps += _switches() > self._switches
        return ThreadUse(self._governor.threads, self._governor.num_changes, self._late_steps)

    def _look(self, use: CoreUse, now: float) -> None:
        others_s = use.others_s()
        if now - self._stepped_at < _IDLE_S:
            share = (others_s - self._others_s) / (now - self._looked_at)
            self._governor.observe(now=now, available=use.cores - share)
        self._looked_at, self._others_s = now, others_s


def _name_thread() -> None:
    """Give the calling thread its name in the system too: those that it starts inherit it."""
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    if comm.exists():
        comm.write_text(threading.current_thread().name[:15])


def _switches() -> int:
    """How often the calling thread lost its core to another thread."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_nivcsw
