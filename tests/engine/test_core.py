"""Failures around the steps: exceptions in a turn, late fetches, detokenizers and handlers."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from unittest.mock import Mock

import pytest

from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.engine.prefix_source import PrefixUnavailable
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixKey,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.engine.step import Step
from prefixd.server.engine.step_budget import StepBudget
from prefixd.server.testing import ByteDetokenizer, FakeStaged
from tests.engine.test_engine import PREFIX, PROMPT, Bench, answer, expected, fail_steps

pytestmark = pytest.mark.usefixtures("depth")

UNDELIVERED = "the engine could not deliver this answer"


def fail_the_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next turn fail; the scheduler created after it works."""

    def failing(**_: object) -> Step:
        raise AssertionError("a bug in the scheduler")

    monkeypatch.setattr(bench.engine.core.scheduler, "schedule", failing)


@pytest.mark.parametrize("late_result", [None, FakeStaged(5), FakeStaged(6)])
def test_fetch_from_before_a_restart_is_ignored(
    late_result: FakeStaged | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    begun, leave, entered, proceed = (threading.Event() for _ in range(4))
    fetch = bench.source.fetch

    def slow_at_first(key: PrefixKey) -> object:
        if begun.is_set():
            return fetch(key)
        begun.set()
        leave.wait(20)
        if late_result is None:
            raise PrefixUnavailable("gone")
        return late_result

    def hold(step: Step) -> None:
        if any(chunk.prefix == PREFIX.key for chunk in step.chunks) and not entered.is_set():
            entered.set()
            proceed.wait(20)

    monkeypatch.setattr(bench.source, "fetch", slow_at_first)
    fail_steps(bench, monkeypatch, hold)
    bench.engine.start()
    _, before = bench.submit(prefix=PREFIX)
    assert begun.wait(20)
    fail_the_turn(bench, monkeypatch)
    assert answer(before)[1].reason is FinishReason.ERROR
    _, after = bench.submit(prefix=PREFIX)
    assert entered.wait(20)
    leave.set()
    bench.engine.core.stop_threads()  # the late fetch has been posted
    proceed.set()
    assert answer(after)[0] == expected(12, "digest")
    assert answer(bench.submit(prefix=PREFIX)[1])[0] == expected(12, "digest")
    bench.engine.stop()
    assert bench.engine.stats().restarts == 1


def broken_at(moment: str) -> Callable[[Sequence[int]], ByteDetokenizer]:
    """Detokenizers of which the first fails at one of its calls, and the others work."""
    has_failed = threading.Event()

    class Broken(ByteDetokenizer):
        def __init__(self, prompt: Sequence[int]) -> None:
            self.fail("init")
            super().__init__(prompt)

        def push(self, token_id: int) -> Sequence[TokenText]:
            self.fail("push")
            return super().push(token_id)

        def flush(self) -> Sequence[TokenText]:
            self.fail("flush")
            return super().flush()

        def fail(self, now: str) -> None:
            if now == moment and not has_failed.is_set():
                has_failed.set()
                raise ValueError("a bug in the tokenizer")

    return Broken


@pytest.mark.parametrize("moment", ["init", "push", "flush"])
def test_failing_detokenizer_ends_only_its_sequence(moment: str) -> None:
    bench = Bench(detokenizer=broken_at(moment))
    _, failing = bench.submit()
    intact = [bench.submit()[1] for _ in range(3)]
    bench.engine.start()
    end = answer(failing)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, UNDELIVERED)
    assert [answer(events)[0] for events in intact] == 3 * [expected(12)]
    bench.engine.stop()
    assert bench.engine.stats().restarts == 0
    assert bench.engine.stats().finished["error"] == 1
    bench.engine.core.scheduler.check_integrity()


def test_failing_event_handler_ends_only_its_sequence(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    events_sent: queue.Queue[Event] = queue.Queue()

    def raises(event: Event) -> None:
        events_sent.put(event)
        raise ValueError("a caller's bug")

    request = AdmittedRequest(
        "bad", "t", PROMPT, None, SamplingParams(temperature=0), StopParams(max_tokens=12)
    )
    bench.engine.submit(request, raises)
    _, other = bench.submit()
    with caplog.at_level(logging.ERROR):
        bench.engine.start()
        assert answer(other)[0] == expected(12)
        bench.engine.stop()
    first, last = events_sent.get_nowait(), events_sent.get_nowait()
    assert isinstance(first, TokenEvent)
    assert isinstance(last, FinishEvent)
    assert (last.reason, last.error) == (FinishReason.ERROR, UNDELIVERED)
    assert events_sent.empty()
    assert "a caller's bug" in caplog.text
    assert "bad" in caplog.text


def test_failing_detokenizer_during_a_restart_ends_only_its_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(detokenizer=broken_at("flush"))
    going, go_on = threading.Event(), threading.Event()

    def hold(step: Step) -> None:
        if not going.is_set() and any(chunk.start > len(PROMPT) for chunk in step.chunks):
            going.set()
            go_on.wait(20)

    fail_steps(bench, monkeypatch, hold)
    both = [bench.submit(max_tokens=100)[1] for _ in range(2)]
    bench.engine.start()
    assert going.wait(20)
    fail_the_turn(bench, monkeypatch)
    go_on.set()
    errors = [answer(events)[1].error for events in both]
    assert errors == [UNDELIVERED, "the engine had to start over; please try again"]
    assert answer(bench.submit()[1])[0] == expected(12)
    bench.engine.stop()
    assert bench.engine.stats().restarts == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_engine_that_cannot_start_over_ends_all_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    _, events = bench.submit()
    fail_the_turn(bench, monkeypatch)

    def failing() -> None:
        raise ValueError("no scheduler either")

    monkeypatch.setattr(bench.engine.core, "_new_scheduler", failing)
    bench.engine.start()
    assert answer(events)[1].reason is FinishReason.ERROR
    bench.engine.stop()
    assert answer(bench.submit()[1]) == ("", FinishEvent(0, FinishReason.ABORT, 0))


def test_engine_that_ends_with_failing_calls_pending_aborts_all_requests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    going, go_on = threading.Event(), threading.Event()

    def hold(step: Step) -> None:
        going.set()
        go_on.wait(20)

    def failing(*_: object) -> None:
        raise ValueError("a bug in the core")

    fail_steps(bench, monkeypatch, hold)
    monkeypatch.setattr("prefixd.server.engine.core._MAX_RESTARTS", 0)
    bench.engine.start()
    _, running = bench.submit(max_tokens=100)
    assert going.wait(20)
    monkeypatch.setattr(bench.engine.core, "preload", failing)
    for _ in range(3):
        bench.engine.preload(PREFIX)
    _, posted_last = bench.submit()
    with caplog.at_level(logging.ERROR):
        go_on.set()
        assert answer(running)[1].error == "the engine stopped unexpectedly"
        assert answer(posted_last)[1].reason is FinishReason.ABORT
    bench.engine.stop()
    assert bench.engine.state()["running"]["count"] == 0
    assert bench.engine.stats().finished["abort"] == 1
    assert "a bug in the core" in caplog.text


@pytest.mark.parametrize("depth", [0], indirect=True)  # one behind, they run while the device does
def test_step_time_excludes_detokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Mock(perf_counter=Mock(return_value=0.0))
    monkeypatch.setattr("prefixd.server.engine.pipeline.time", clock)

    class Slow(ByteDetokenizer):
        def push(self, token_id: int) -> Sequence[TokenText]:
            clock.perf_counter.return_value += 1.0
            return super().push(token_id)

    def take(step: Step) -> None:
        clock.perf_counter.return_value += 0.125

    bench = Bench(detokenizer=Slow)
    fail_steps(bench, monkeypatch, take)
    _, events = bench.submit(max_tokens=3)
    bench.engine.start()
    answer(events)
    bench.engine.stop()
    stats = bench.engine.stats()
    assert stats.generated_tokens == stats.steps == 3
    assert stats.step_seconds == 0.375


class LateDetokenizer(ByteDetokenizer):
    """Holds the last character back until the next one, or ``flush``."""

    def __init__(self, prompt: Sequence[int]) -> None:
        super().__init__(prompt)
        self._last: Sequence[TokenText] = ()

    def push(self, token_id: int) -> Sequence[TokenText]:
        tokens, self._last = self._last, super().push(token_id)
        return tokens

    def flush(self) -> Sequence[TokenText]:
        tokens, self._last = self._last, ()
        return tokens


def test_stop_string_completed_by_the_last_text_is_the_end() -> None:
    bench = Bench(detokenizer=LateDetokenizer)
    text = expected(12)
    _, events = bench.submit(strings=(text[10:],))
    bench.engine.start()
    delivered, end = answer(events)
    bench.engine.stop()
    assert delivered == text[:10]
    assert (end.reason, end.stop) == (FinishReason.STOP, text[10:])
    assert bench.engine.stats().finished["stop"] == 1
    assert bench.engine.stats().finished["length"] == 0


def test_the_time_of_each_step_is_measured_for_the_budget_of_the_next() -> None:
    bench = Bench()
    budget = bench.engine.core.scheduler.step_budget = StepBudget(60.0)
    bench.engine.start()
    prompt = tuple(range(80))
    assert answer(bench.submit(prompt=prompt, max_tokens=3)[1])[1].reason is FinishReason.LENGTH
    bench.engine.stop()
    assert budget.token_s is not None
    assert budget.token_s > 0
    assert budget.decode_s > 0


def test_callers_are_woken_when_the_thread_leaves_for_the_device(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while it runs the Python of a step; and no step is waited for when there is none."""
    bench = Bench()
    seen: list[str] = []
    schedule, submit = bench.engine.core.scheduler.schedule, bench.runner.submit

    def record(**values: float) -> Step:
        seen.append("schedule")
        return schedule(**values)

    def record_submitted(step: Step) -> None:
        seen.append("submit")
        submit(step)

    monkeypatch.setattr(bench.engine.core.scheduler, "schedule", record)
    monkeypatch.setattr(bench.runner, "submit", record_submitted)
    fail_steps(bench, monkeypatch, lambda _step: seen.append("run"))
    request = AdmittedRequest(
        "r", "acme", PROMPT, None, SamplingParams(temperature=0.0), StopParams(max_tokens=3)
    )
    ended = threading.Event()

    def on_event(event: Event) -> None:
        seen.append("event")
        if isinstance(event, FinishEvent):
            ended.set()

    bench.engine.submit(request, on_event, deliver=lambda: seen.append("deliver"))
    bench.engine.start()
    assert ended.wait(20)
    bench.engine.stop()
    if depth:  # the next step is submitted before the tokens of the one before are known
        step = ["schedule", "submit", "deliver", "run", "event"]
        begin = ["schedule", "submit", "schedule", "submit", "run", "event"]
        whole = [*begin, *step, "schedule", "deliver", "run", "event", "event", "deliver"]
    else:
        step = ["schedule", "submit", "deliver", "run", "event"]
        whole = ["schedule", "submit", "run", "event", *step, *step, "event", "deliver"]
    assert seen[: len(whole)] == whole
