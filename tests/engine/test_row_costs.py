"""What drafts cost, measured."""

import pytest

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.row_costs import (
    FORGOTTEN_AFTER,
    PLAIN_EVERY,
    UNMEASURED,
    RowCosts,
)
from prefixd.server.engine.step import Chunk, Draft, Step


def step_of(rows: int, drafts: int = 0) -> Step:
    step = Step()
    for number in range(rows):
        chunk = Chunk(number, [1], 0, (1,), sampling=SamplingParams(temperature=0))
        if number == 0 and drafts:
            chunk.draft = Draft([2] * drafts, [0.0] * drafts)
        step.chunks.append(chunk)
    return step


def costs_of(rows: int, times: dict[int, float]) -> RowCosts:
    """Measured: a step of ``rows`` takes so many seconds by the number of drafts."""
    costs = RowCosts()
    for drafts, seconds in sorted(times.items()):
        costs.observe(step_of(rows, drafts), seconds=seconds)
    return costs


def test_each_number_of_drafts_costs_what_it_took() -> None:
    costs = costs_of(8, {0: 0.010, 1: 0.012, 3: 0.011, 8: 0.013, 9: 0.009})
    slowdowns = [costs.slowdown(8, drafts) for drafts in range(9)]
    assert slowdowns[0] == 1.0
    assert slowdowns[1] == pytest.approx(1.2)
    assert slowdowns[2] == pytest.approx(1.15), "between its neighbours"
    assert slowdowns[3] == pytest.approx(1.1)
    assert slowdowns[4] == pytest.approx(1.14)
    assert slowdowns[8] == pytest.approx(1.3)
    assert costs.slowdown(8, 9) == 1.0, "drafts make no step faster"


def test_rows_that_are_not_known_are_assumed_cheap() -> None:
    assert RowCosts().slowdown(8, 4) == 1.0 + 4 * UNMEASURED / 8
    dear = costs_of(8, {0: 0.010, 1: 0.030})
    assert dear.slowdown(8, 5) == pytest.approx(3.0 + 4 * UNMEASURED / 8)
    free = costs_of(1, {0: 0.010, 2: 0.0102})
    assert free.slowdown(1, 8) == pytest.approx(1.08)
    assert free.slowdown(2, 8) == 1.0 + 8 * UNMEASURED / 2, "of one sequence, not of two"


def test_one_slow_step_is_no_measure() -> None:
    costs = costs_of(8, {0: 0.010, 4: 0.011})
    for seconds in (0.5, 0.011):
        costs.observe(step_of(8, 4), seconds=seconds)
    assert costs.slowdown(8, 4) == pytest.approx(1.1)


def test_a_slowdown_that_is_not_measured_again_is_forgotten() -> None:
    costs = costs_of(8, {0: 0.010, 2: 0.5, 3: 0.011})
    for _ in range(2 * FORGOTTEN_AFTER):
        costs.observe(step_of(8, 0), seconds=0.010)
        costs.observe(step_of(8, 3), seconds=0.011)
    assert costs.slowdown(8, 2) == pytest.approx(1.0 + 0.1 * 2 / 3)
    assert costs.slowdown(8, 3) == pytest.approx(1.1), "it was measured again"


def test_a_step_without_drafts_is_measured_first_and_again() -> None:
    costs = RowCosts()
    assert costs.needs_plain(2)
    costs.observe(step_of(2), seconds=0.01)
    assert costs.needs_plain(3)
    for _ in range(PLAIN_EVERY):
        assert not costs.needs_plain(2)
        costs.observe(step_of(2, 2), seconds=0.01)
    assert costs.needs_plain(2)


def test_steps_with_prompts_say_nothing_about_rows() -> None:
    costs, step = RowCosts(), step_of(2)
    step.chunks[1].tokens = [1, 2, 3]
    costs.observe(step, seconds=9.0)
    assert costs.needs_plain(2)
