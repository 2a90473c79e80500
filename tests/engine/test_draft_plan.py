"""Which drafts pay, decided for a step."""

import itertools
from math import log

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.draft_plan import Candidate, plan_drafts
from prefixd.server.engine.request import AdmittedRequest, SamplingParams, StopParams
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.testing import FakeRunner

ROWS, TILE = 8, 8


def staircase(drafts: int) -> float:
    """The time of a step of 8 sequences and ``drafts`` drafts; each tile of rows after the first
    takes half as long as that."""
    return 1.0 + 0.5 * (-(-(ROWS + drafts) // TILE) - 1)


def plan(*candidates: tuple[float, int], budget: int = 999) -> list[int]:
    listed = [Candidate(*each) for each in candidates]
    return plan_drafts(listed, rows=ROWS, budget=budget, slowdown=staircase)


def test_drafts_that_do_not_pay_alone_pay_for_a_tile_together() -> None:
    likely = (0.6, 1)
    assert log(1.6) < ROWS * log(staircase(1)) < 8 * log(1.6)
    assert plan(likely) == [0]
    assert plan(*[likely] * 6) == [0] * 6
    assert plan(*[likely] * 8) == [1] * 8
    assert plan(*[(0.55, 1)] * 8) == [0] * 8, "a gain of 3 % is less than what is unknown"


def test_a_tile_that_is_paid_is_filled_with_less_likely_drafts() -> None:
    likely, unlikely = (0.95, 1), (0.05, 1)
    assert plan(*[unlikely] * 8) == [0] * 8
    assert plan(*[likely] * 7, unlikely, unlikely) == [1] * 8 + [0]


def test_a_further_tile_is_weighed_for_itself() -> None:
    assert plan(*[(0.8, 8)] * 8) == [2] * 8
    assert plan(*[(0.7, 8)] * 8) == [1] * 8


def test_one_sequence_does_not_slow_down_seven_others() -> None:
    assert plan((0.99, 8)) == [0]
    free = plan_drafts([Candidate(0.9, 8)], rows=64, budget=999, slowdown=lambda _: 1.0)
    assert free == [8], "where rows are free, one of many may have them"
    assert plan_drafts(
        [Candidate(0.99, 8)], rows=1, budget=99, slowdown=lambda drafts: staircase(drafts - 7)
    ) == [7], "the ninth row is another tile"


def test_where_a_draft_helps_most_it_comes_first() -> None:
    assert plan((0.9, 8), (0.3, 8), *[(0.9, 1)] * 6) == [2, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_limits_and_budget_hold(budget: int) -> None:
    counts = plan_drafts(
        [Candidate(0.9, 0), Candidate(0.9, -3), Candidate(0.9, 3), Candidate(0.8, 8)],
        rows=4,
        budget=budget,
        slowdown=lambda _: 1.0,
    )
    assert counts[:2] == [0, 0]
    assert counts[2] <= 3
    assert sum(counts) == budget


def test_free_rows_take_every_draft_that_may_help_at_all() -> None:
    assert plan_drafts(
        [Candidate(0.3, 8), Candidate(0.01, 8)], rows=2, budget=99, slowdown=lambda _: 1.0
    ) == [2, 0]


class MixedRunner(FakeRunner):
    """The first sequences repeat five tokens; the rest only two of three, and what follows them is
    new each time."""

    num_repeating = 0

    def _next(self, table: object, length: int) -> int:
        if self._read(table, 0) < self.num_repeating:  # type: ignore[arg-type, operator]
            return 10 + length % 5
        return (10, 11, 1000 + length)[length % 3]


class Bench:
    """A scheduler, and a clock that steps move by the number of their tiles."""

    def __init__(self, *, speculate: bool) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(num_blocks=999, block_size=16, speculate=speculate)
        )
        self.runner = MixedRunner(vocab_size=9999)
        self._ids = itertools.count()

    def time_of(self, *, num_repeating: int) -> float:
        """What 8 sequences take together, until the last one has ended."""
        self.runner.num_repeating = num_repeating
        for number in range(ROWS):
            seq_id = next(self._ids)
            admitted = AdmittedRequest(
                request_id=str(seq_id),
                tenant="t",
                prompt=(number, 10, 11, 12, 13, 14),
                prefix=None,
                sampling=SamplingParams(temperature=0),
                stop=StopParams(max_tokens=250),
                kv_reuse=False,
            )
            self.scheduler.add(Sequence(seq_id, admitted, 0, 0, list(admitted.prompt)))
        total = 0.0
        while not self.scheduler.idle:
            step = self.scheduler.schedule()
            seconds = 0.5 + 0.5 * -(-step.num_tokens // TILE)
            total += seconds
            output = self.runner.run(step)
            self.scheduler.observe(step, seconds)
            self.scheduler.update(step, output)
        return total


@pytest.mark.parametrize("before", [0, 1, ROWS])
@pytest.mark.parametrize("num_repeating", [0, 1])
def test_a_sequence_that_repeats_costs_the_others_little(before: int, num_repeating: int) -> None:
    times = {}
    for speculate in (True, False):
        bench = Bench(speculate=speculate)
        bench.time_of(num_repeating=before)
        times[speculate] = bench.time_of(num_repeating=num_repeating)
    assert times[True] <= 1.015 * times[False]


@pytest.mark.parametrize("before", [0, 1, ROWS])
def test_sequences_that_all_repeat_are_faster_together(before: int) -> None:
    times = {}
    for speculate in (True, False):
        bench = Bench(speculate=speculate)
        bench.time_of(num_repeating=before)
        times[speculate] = bench.time_of(num_repeating=ROWS)
    assert times[True] < 0.6 * times[False]
