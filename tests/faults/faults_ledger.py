"""Who was served what in each step, and who waited: fairness in counts, not in seconds.

Service is what the Virtual Token Counter charges ("Fairness in Serving Large Language Models",
Sheng et al., 2024), with both prices 1: the prefix's positions and the prompt when a sequence
starts, and every output token.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.step import Step, StepOutput


@dataclass(frozen=True)
class Entry:
    """One step: tokens served by tenant, tenants that still waited, rows by tenant, and the
    positions that all running sequences had in the pool."""

    served: Counter[str]
    waiting: frozenset[str]
    rows: Counter[str]
    held: int


class Ledger:
    """A runner that writes down what the steps it runs are good for.

    A step waits until ``backlog`` sequences do: a crowd of clients is none while a tiny model is
    quicker than HTTP.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.engine: Engine | None = None  # set once there is one
        self.backlog = 0
        self.entries: list[Entry] = []
        self.longest_input = 0
        self.passed: dict[int, int] = {}
        """By sequence that had to wait: tokens other tenants were served before it started."""
        self.by_tenant: defaultdict[str, set[int]] = defaultdict(set)
        self._started: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> StepOutput:
        """Run a step and enter it."""
        assert self.engine is not None
        scheduler, pause = self.engine.loop.scheduler, threading.Event()
        while len(scheduler.waiting) + len(self.engine.loop._inbox) < self.backlog:
            pause.wait(0.001)
        running = {sequence.seq_id: sequence for sequence in scheduler.running}
        served: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for chunk in step.chunks:
            sequence = running[chunk.seq_id]
            rows[sequence.tenant] += 1
            if chunk.seq_id not in self._started:
                self._started.add(chunk.seq_id)
                size = sequence.num_prefix_tokens + sequence.num_prompt
                self.longest_input = max(self.longest_input, size)
                served[sequence.tenant] += size
            served[sequence.tenant] += chunk.sampling is not None
        for sequence in scheduler.waiting:
            self.by_tenant[sequence.tenant].add(sequence.seq_id)
            others = sum(served.values()) - served[sequence.tenant]
            self.passed[sequence.seq_id] = self.passed.get(sequence.seq_id, 0) + others
        waiting = frozenset(sequence.tenant for sequence in scheduler.waiting)
        held = sum(s.num_prefix_tokens + len(s.tokens) for s in running.values())
        self.entries.append(Entry(served, waiting, rows, held))
        return self.inner.run(step)

    @property
    def bound(self) -> int:
        """The paper's bound on how far two backlogged tenants' service can differ: twice the
        larger of the longest input and what the running sequences hold."""
        return 2 * max(self.longest_input, *(entry.held for entry in self.entries))

    def backlogged(self, *tenants: str) -> Iterator[list[Entry]]:
        """Longest runs of steps in which all of ``tenants`` waited."""
        run: list[Entry] = []
        for entry in self.entries:
            if set(tenants) <= entry.waiting:
                run.append(entry)
            elif run:
                yield run
                run = []
        if run:
            yield run


def drift(run: list[Entry], first: str, second: str, *, weights: tuple[float, float]) -> float:
    """The largest difference of weighted service that any stretch of ``run`` shows."""
    apart = lowest = highest = 0.0
    for entry in run:
        apart += entry.served[first] / weights[0] - entry.served[second] / weights[1]
        lowest, highest = min(lowest, apart), max(highest, apart)
    return highest - lowest
