"""What fails around the steps: the loop itself, and a fetch from before it started over."""

import threading

import pytest
from test_engine import PREFIX, Bench, answer, expected, fail_steps

from server.engine.request import (
    FinishReason,
    PrefixKey,
)
from server.engine.step import PrefixUnavailable, Step
from server.testing import FakeStaged


def fail_the_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next turn of the loop fail; the scheduler that comes then is a sound one."""

    def broken(**_: object) -> Step:
        raise AssertionError("a bug in the scheduler")

    monkeypatch.setattr(bench.engine.scheduler, "schedule", broken)


@pytest.mark.parametrize("late", [None, FakeStaged(5), FakeStaged(6)])
def test_a_fetch_from_before_the_loop_started_over_is_nobodys(
    late: FakeStaged | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    begun, leave, entered, proceed = (threading.Event() for _ in range(4))
    fetch = bench.source.fetch

    def slow_at_first(key: PrefixKey) -> object:
        if begun.is_set():
            return fetch(key)
        begun.set()
        leave.wait(20)
        if late is None:
            raise PrefixUnavailable("gone")
        return late

    def hold(step: Step) -> None:
        if any(chunk.prefix == PREFIX.key for chunk in step.chunks) and not entered.is_set():
            entered.set()
            proceed.wait(20)

    monkeypatch.setattr(bench.source, "fetch", slow_at_first)
    fail_steps(bench, monkeypatch, hold)
    bench.engine.start()
    _, before = bench.submit(prefix=PREFIX)
    assert begun.wait(20)
    fail_the_loop(bench, monkeypatch)
    assert answer(before)[1].reason is FinishReason.ERROR
    _, after = bench.submit(prefix=PREFIX)
    assert entered.wait(20)
    leave.set()
    bench.engine._fetchers.stop()  # the late one has been heard of
    proceed.set()
    assert answer(after)[0] == expected(12, "digest")
    assert answer(bench.submit(prefix=PREFIX)[1])[0] == expected(12, "digest")
    bench.engine.stop()
    assert bench.engine.stats().restarts == 1
