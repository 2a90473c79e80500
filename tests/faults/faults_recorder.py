"""Records the tokens served to each tenant in each step, to test fairness by counts.

Service is what the Virtual Token Counter charges ("Fairness in Serving Large Language Models",
Sheng et al., 2024), with both weights 1: the prefix's positions and the prompt when a sequence
starts, and every output token.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.step import Step, StepOutput


@dataclass(frozen=True)
class StepRecord:
    """One step: tokens served by tenant, tenants with waiting sequences, rows by tenant, and the
    positions of all running sequences in the pool."""

    served: Counter[str]
    waiting: frozenset[str]
    rows: Counter[str]
    held: int


class StepRecorder(BlockingRunner):
    """A runner that records the service of each step.

    A step starts only when ``backlog`` sequences wait: otherwise a tiny model is faster than HTTP
    and the queue stays empty.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.engine: Engine | None = None  # set after the engine is created
        self.backlog = 0
        self.entries: list[StepRecord] = []
        self.longest_input = 0
        self.passed: dict[int, int] = {}
        """By waiting sequence: tokens served to other tenants before it started."""
        self.by_tenant: defaultdict[str, set[int]] = defaultdict(set)
        self._started: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> StepOutput:
        """Record a step and run it."""
        assert self.engine is not None
        scheduler, pause = self.engine.core.scheduler, threading.Event()
        while len(scheduler.waiting) + len(self.engine._inbox) < self.backlog:
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
            other_tokens = sum(served.values()) - served[sequence.tenant]
            self.passed[sequence.seq_id] = self.passed.get(sequence.seq_id, 0) + other_tokens
        waiting = frozenset(sequence.tenant for sequence in scheduler.waiting)
        held = sum(s.num_prefix_tokens + len(s.tokens) for s in running.values())
        self.entries.append(StepRecord(served, waiting, rows, held))
        return self.inner.run(step)

    @property
    def bound(self) -> int:
        """The paper's bound on the difference in service of two backlogged tenants: twice the
        larger of the longest input and the positions of the running sequences."""
        return 2 * max(self.longest_input, *(entry.held for entry in self.entries))

    def backlogged(self, *tenants: str) -> Iterator[list[StepRecord]]:
        """Maximal runs of successive steps in which all of ``tenants`` waited."""
        run: list[StepRecord] = []
        for entry in self.entries:
            if set(tenants) <= entry.waiting:
                run.append(entry)
            elif run:
                yield run
                run = []
        if run:
            yield run


def drift(run: list[StepRecord], first: str, second: str, *, weights: tuple[float, float]) -> float:
    """The largest difference of weighted service over any part of ``run``."""
    difference = lowest = highest = 0.0
    for entry in run:
        difference += entry.served[first] / weights[0] - entry.served[second] / weights[1]
        lowest, highest = min(lowest, difference), max(highest, difference)
    return highest - lowest
