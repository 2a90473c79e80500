"""What fails around the steps: the loop itself, a fetch from before, the way back to a caller."""

import logging
import queue
import threading
from collections.abc import Callable

import pytest

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
from prefixd.server.engine.step import PrefixUnavailable, Step
from prefixd.server.testing import ByteDetokenizer, FakeStaged
from tests.engine.test_engine import PREFIX, PROMPT, Bench, answer, expected, fail_steps

UNDELIVERED = "the engine could not deliver this answer"


def fail_the_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next turn of the loop fail; the scheduler that comes then is a sound one."""

    def broken(**_: object) -> Step:
        raise AssertionError("a bug in the scheduler")

    monkeypatch.setattr(bench.engine.core.scheduler, "schedule", broken)


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
    bench.engine.core._fetch_pool.shutdown()  # the late fetch has been posted
    proceed.set()
    assert answer(after)[0] == expected(12, "digest")
    assert answer(bench.submit(prefix=PREFIX)[1])[0] == expected(12, "digest")
    bench.engine.stop()
    assert bench.engine.stats().restarts == 1


def broken_at(moment: str) -> Callable[[], ByteDetokenizer]:
    """Detokenizers of which the first to be asked fails at one of its calls; others are sound."""
    spent = threading.Event()

    class Broken(ByteDetokenizer):
        def __init__(self) -> None:
            self.fail("init")
            super().__init__()

        def push(self, token_id: int) -> str:
            self.fail("push")
            return super().push(token_id)

        def flush(self) -> str:
            self.fail("flush")
            return super().flush()

        def fail(self, now: str) -> None:
            if now == moment and not spent.is_set():
                spent.set()
                raise ValueError("a bug in the tokenizer")

    return Broken


@pytest.mark.parametrize("moment", ["init", "push", "flush"])
def test_text_that_cannot_be_made_ends_that_one_answer(moment: str) -> None:
    bench = Bench(detokenizer=broken_at(moment))
    _, broken = bench.submit()
    others = [bench.submit()[1] for _ in range(3)]
    bench.engine.start()
    end = answer(broken)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, UNDELIVERED)
    assert [answer(events)[0] for events in others] == 3 * [expected(12)]
    bench.engine.stop()
    assert bench.engine.stats().restarts == 0
    assert bench.engine.stats().finished["error"] == 1
    bench.engine.core.scheduler.check_integrity()


def test_a_handler_that_fails_ends_that_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    heard: queue.Queue[Event] = queue.Queue()

    def raises(event: Event) -> None:
        heard.put(event)
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
    first, last = heard.get_nowait(), heard.get_nowait()
    assert isinstance(first, TokenEvent)
    assert isinstance(last, FinishEvent)
    assert (last.reason, last.error) == (FinishReason.ERROR, UNDELIVERED)
    assert heard.empty()
    assert "a caller's bug" in caplog.text
    assert "bad" in caplog.text


def test_text_that_cannot_be_made_while_the_loop_starts_over_harms_nobody(
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
    fail_the_loop(bench, monkeypatch)
    go_on.set()
    errors = [answer(events)[1].error for events in both]
    assert errors == [UNDELIVERED, "the engine had to start over; please try again"]
    assert answer(bench.submit()[1])[0] == expected(12)
    bench.engine.stop()
    assert bench.engine.stats().restarts == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_cannot_start_over_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    _, events = bench.submit()
    fail_the_loop(bench, monkeypatch)

    def broken() -> None:
        raise ValueError("no scheduler either")

    monkeypatch.setattr(bench.engine.core, "_new_scheduler", broken)
    bench.engine.start()
    assert answer(events)[1].reason is FinishReason.ERROR
    bench.engine.stop()
    assert answer(bench.submit()[1]) == ("", FinishEvent(0, FinishReason.ABORT, 0))
