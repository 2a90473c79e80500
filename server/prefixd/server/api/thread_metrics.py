"""Threads that libraries started, such as those of OpenMP."""

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_TASKS = Path("/proc/self/task")
_ENGINE = "engine"


def library_threads() -> Counter[str]:
    """How many threads that are not Python's the process has, by the thread that started them:
    "engine" or "other". Zero where the system does not list threads.

    A thread inherits its name in the system from the one that starts it, and only the engine's
    thread has a name of its own there.
    """
    started = Counter({_ENGINE: 0, "other": 0})
    try:
        tasks = sorted(_TASKS.iterdir())
    except OSError:
        return started
    python = {str(thread.native_id) for thread in threading.enumerate()}
    for task in tasks:
        if task.name in python:
            continue
        try:
            name = (task / "comm").read_text().strip()
        except OSError:  # it has ended
            continue
        started[_ENGINE if name == _ENGINE else "other"] += 1
    return started


class ThreadCollector(Collector):
    """Counts them at every scrape."""

    def collect(self) -> Iterable[Metric]:
        """The one metric."""
        family = GaugeMetricFamily(
            "prefixd_library_threads",
            "Threads that libraries started, by the thread that started them.",
            labels=["started_by"],
        )
        for started_by, count in sorted(library_threads().items()):
            family.add_metric([started_by], count)
        yield family
