"""Alternating rounds of one workload: which runs count, and what they give."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.children import EngineFailed, Measured
from benchmarks.workloads import Workload, figure_of, rotations

Requests = Sequence[Mapping[str, Any]]
Runner = Callable[[Requests], Measured]


@dataclass
class Round:
    """The runs of one round by engine, in the order in which they ran."""

    runs: dict[str, Measured]
    noisy: list[str]


@dataclass
class Series:
    """The rounds of one workload. ``noise`` foreign cores drop a round; ``failed`` are engines that
    were left out from some round on, and why."""

    workload: Workload
    noise: float
    counted: list[Round] = field(default_factory=list)
    dropped: list[Round] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def figures(self, engine: str) -> list[float]:
        """The engine's figure in each counted round."""
        return [
            figure_of(
                self.workload,
                seconds=run.seconds,
                first=run.first,
                served=len(run.tokens),
            )
            for run in self._runs(engine)
        ]

    def cpu_seconds(self, engine: str) -> list[float]:
        """The CPU seconds of all requests in each counted round; where an engine ran some of them,
        as many as all would take."""
        return [
            run.load.cpu * self.workload.requests / len(run.tokens) for run in self._runs(engine)
        ]

    def _runs(self, engine: str) -> list[Measured]:
        return [each.runs[engine] for each in self.counted if engine in each.runs]

    def ratios(self, ours: str, other: str) -> list[float]:
        """How many times faster ``ours`` was in each counted round."""
        pairs = zip(self.figures(ours), self.figures(other), strict=False)
        more = self.workload.figure.more_is_better
        return [a / b if more else b / a for a, b in pairs]


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(values) if values else None


class Contest:
    """The engines that run one workload. In a round each gets the same, fresh requests."""

    def __init__(
        self,
        workload: Workload,
        runners: Mapping[str, Runner],
        take_prompts: Callable[[], Requests],
        *,
        noise: float,
    ) -> None:
        self.series = Series(workload, noise)
        self._runners = runners
        self._take_prompts = take_prompts
        self._orders = rotations(list(runners))

    def run_round(self, number: int) -> str:
        """Run every engine once; returns a line for people. Round 0 warms up."""
        series, requests, current = self.series, self._take_prompts(), Round({}, [])
        for name in next(self._orders):
            if name in series.failed:
                continue
            try:
                run = self._runners[name](requests)
            except EngineFailed as error:
                series.failed[name] = str(error)
                continue
            current.runs[name] = run
            if run.load.foreign + run.load.steal > series.noise:
                current.noisy.append(name)
        if number > 0:
            (series.dropped if current.noisy else series.counted).append(current)
        return _line(series.workload, number, current)


def measure(
    contests: Sequence[Contest],
    *,
    rounds: int,
    most_rounds: int,
    report: Callable[[str], None] = lambda _: None,
) -> list[Series]:
    """Run rounds of all workloads until ``rounds`` of each count, or ``most_rounds`` have been run
    after the first, which warms up. Workloads alternate too.

    A round is dropped when others used, or the hypervisor took, more cores than the noise during
    any of its runs: all engines are compared in the same rounds. An engine that fails is left out
    of the workload from then on.
    """
    for number in range(most_rounds + 1):
        for contest in contests:
            if len(contest.series.counted) < rounds:
                report(contest.run_round(number))
    return [contest.series for contest in contests]


def _line(workload: Workload, number: int, current: Round) -> str:
    parts = []
    for name, run in current.runs.items():
        value = figure_of(workload, seconds=run.seconds, first=run.first, served=len(run.tokens))
        mark = "*" if name in current.noisy else ""
        parts.append(f"{name} {value:.4g}{mark}")
    label = "warm-up" if number == 0 else f"round {number}"
    return f"{workload.name} {label}: {', '.join(parts)} {workload.figure}"
