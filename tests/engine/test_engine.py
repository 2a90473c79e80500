"""The engine over the shipped fakes: events, stop conditions, aborts, failures, readiness."""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.detokenizer import Detokenizer
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.prefix_source import STORAGE_UNAVAILABLE, PrefixUnavailable
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    QueueFull,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.sequence import seeded_uniform
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.testing import ByteDetokenizer, FakeRunner, FakeSource, fake_generate

pytestmark = pytest.mark.usefixtures("depth")

PREFIX = PrefixHandle(PrefixKey("t", "digest"), 5)
PROMPT = tuple(b"hello")


class Bench:
    """An engine over fakes, and a way to submit requests."""

    depth = 0

    def __init__(
        self,
        *,
        watchdog_s: float = 60.0,
        max_waiting_tokens: int | None = None,
        detokenizer: Callable[[Sequence[int]], Detokenizer] = ByteDetokenizer,
    ) -> None:
        self.runner = FakeRunner(block_size=4, depth=self.depth)
        self.source = FakeSource({PREFIX.key: 5})
        self.engine = Engine(
            config=SchedulerConfig(
                num_blocks=64,
                block_size=4,
                max_tokens_per_step=32,
                max_running=8,
                max_waiting_tokens=max_waiting_tokens,
            ),
            runner=self.runner,
            source=self.source,
            detokenizer=detokenizer,
            watchdog_s=watchdog_s,
        )
        self.count = 0

    def submit(
        self,
        *,
        prefix: PrefixHandle | None = None,
        n: int = 1,
        prompt: tuple[int, ...] = PROMPT,
        tenant: str = "t",
        timeout_s: float | None = None,
        **stop: object,
    ) -> tuple[str, "queue.Queue[Event]"]:
        self.count += 1
        events: queue.Queue[Event] = queue.Queue()
        request = AdmittedRequest(
            request_id=f"r{self.count}",
            tenant=tenant,
            prompt=prompt,
            prefix=prefix,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(**{"max_tokens": 12, **stop}),  # type: ignore[arg-type]
            n=n,
            timeout_s=timeout_s,
        )
        self.engine.submit(request, events.put)
        return request.request_id, events


@pytest.fixture
def bench(depth: int) -> Iterator[Bench]:
    assert Bench.depth == depth
    bench = Bench()
    bench.engine.start()
    yield bench
    bench.engine.stop()
    bench.engine.core.scheduler.check_integrity()
    assert bench.engine.core.scheduler.idle


def answer(events: "queue.Queue[Event]") -> tuple[str, FinishEvent]:
    text = ""
    while True:
        event = events.get(timeout=20)
        if isinstance(event, FinishEvent):
            return text, event
        if isinstance(event, TokenEvent):
            text += event.text


def ended(events: "queue.Queue[Event]") -> tuple[str, FinishReason, int]:
    text, end = answer(events)
    return text, end.reason, end.completion_tokens


def expected(count: int, digest: str | None = None) -> str:
    return bytes(fake_generate(digest, PROMPT, count)).decode()


def test_request_runs_under_its_prefix_and_ends_at_max_tokens(bench: Bench) -> None:
    _, base = bench.submit()
    _, prefixed = bench.submit(prefix=PREFIX)
    assert ended(base) == (expected(12), FinishReason.LENGTH, 12)
    assert ended(prefixed) == (expected(12, "digest"), FinishReason.LENGTH, 12)
    assert expected(12) != expected(12, "digest")


def test_request_with_n_generates_n_sequences(bench: Bench) -> None:
    _, events = bench.submit(n=3)
    texts = ["", "", ""]
    ends: set[int] = set()
    while len(ends) < 3:
        event = events.get(timeout=20)
        if isinstance(event, TokenEvent):
            texts[event.index] += event.text
        else:
            ends.add(event.index)
    assert texts == [expected(12)] * 3


def test_stop_token_ends_the_sequence_without_text(bench: Bench) -> None:
    text = expected(12)
    stop = text[6]
    _, events = bench.submit(token_ids=frozenset({ord(stop)}))
    text_out, end = answer(events)
    assert text_out == text[: text.index(stop)]
    assert (end.reason, end.stop) == (FinishReason.STOP, ord(stop))
    assert end.completion_tokens == text.index(stop) + 1


def test_stop_string_is_removed_from_the_text(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[5:8], "never there"))
    text_out, end = answer(events)
    assert text_out == text[:5]
    assert (end.reason, end.stop, end.completion_tokens) == (FinishReason.STOP, text[5:8], 8)


def test_stop_string_is_included_on_request(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[5:8],), include_stop_string=True)
    assert answer(events)[0] == text[:8]


def test_partial_stop_string_at_the_end_is_sent(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[10:] + "!",))
    assert ended(events) == (text, FinishReason.LENGTH, 12)


def test_stop_strings_are_ignored_before_min_tokens(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[2],), min_tokens=6)
    text_out, _ = answer(events)
    assert text_out.startswith(text[:6])


def test_abort_frees_everything_and_sends_a_finish_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted = threading.Event()

    def when(step: Step) -> Exception | None:
        if any(chunk.start > 20 for chunk in step.chunks):
            assert aborted.wait(20)
        return None

    fail_steps(bench, monkeypatch, when)
    request_id, events = bench.submit(prefix=PREFIX, max_tokens=150)
    while not isinstance(events.get(timeout=20), TokenEvent):
        pass
    bench.engine.abort(request_id)
    aborted.set()
    assert answer(events)[1].reason is FinishReason.ABORT
    bench.engine.abort("unknown ids are ignored")
    _, after = bench.submit()
    answer(after)
    bench.engine.state()  # answered after the turn that sent the last event
    stats = bench.engine.stats()
    assert stats.running == stats.waiting == 0


def test_prefix_that_fails_to_load_fails_only_its_requests(bench: Bench) -> None:
    gone = PrefixHandle(PrefixKey("t", "gone"), 3)
    _, failing = bench.submit(prefix=gone)
    _, fine = bench.submit(prefix=PREFIX)
    end = answer(failing)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, "the prefix is gone from the store")
    assert end.error_code is None
    assert answer(fine)[0] == expected(12, "digest")


def test_error_of_the_prefix_source_hides_internals(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: PrefixKey) -> object:
        raise OSError("/secret/path")

    monkeypatch.setattr(bench.source, "fetch", broken)
    _, events = bench.submit(prefix=PREFIX)
    assert answer(events)[1].error == "the prefix failed to load"


def test_preload_is_refused_when_the_tenant_has_used_all_places(bench: Bench) -> None:
    for number in range(256):
        bench.engine.preload(PrefixHandle(PrefixKey("t", f"too large {number}"), 10_000))
    bench.engine.state()  # answered after all functions posted before
    with pytest.raises(QueueFull, match="too many prefixes are being warmed"):
        bench.engine.preload(PrefixHandle(PrefixKey("t", "another"), 10_000))
    bench.engine.preload(PrefixHandle(PrefixKey("other", "digest"), 10_000))


def fail_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, when: Callable[[Step], Exception | None]
) -> None:
    """Make the runner raise what ``when`` returns for a step."""
    run = bench.runner.run

    def run_or_fail(step: Step) -> StepOutput:
        error = when(step)
        if error is not None:
            raise error
        return run(step)

    monkeypatch.setattr(bench.runner, "run", run_or_fail)


def test_only_the_request_that_breaks_a_step_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = (66, 65, 68)

    def when(step: Step) -> Exception | None:
        return (
            RuntimeError("device lost")
            if any(bad == tuple(c.tokens) for c in step.chunks)
            else None
        )

    fail_steps(bench, monkeypatch, when)
    fine = [bench.submit()[1] for _ in range(3)]
    _, broken = bench.submit(prompt=bad)
    fine += [bench.submit()[1] for _ in range(3)]
    end = answer(broken)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, "the engine failed on this request")
    assert [answer(events)[0] for events in fine] == 6 * [expected(12)]
    assert bench.engine.ready


def test_out_of_memory_makes_steps_smaller_and_no_request_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def when(step: Step) -> Exception | None:
        return OutOfMemory("no room") if step.num_parts > 2 else None

    bench = Bench()
    fail_steps(bench, monkeypatch, when)
    answers = [bench.submit()[1] for _ in range(6)]
    bench.engine.start()  # after the requests, so that the first step has all six
    assert [answer(events)[0] for events in answers] == 6 * [expected(12)]
    bench.engine.stop()
    assert bench.engine.stats().out_of_memory > 0
    assert bench.engine.stats().step_failures == 0


def test_engine_is_not_ready_while_a_step_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(watchdog_s=0.0)
    entered, leave = threading.Event(), threading.Event()

    def when(_: Step) -> Exception | None:
        entered.set()
        leave.wait(20)
        return None

    fail_steps(bench, monkeypatch, when)
    bench.engine.start()
    _, events = bench.submit()
    assert entered.wait(20)
    try:
        assert str(bench.engine.trouble).startswith("no step has ended for")
    finally:
        leave.set()
    assert answer(events)[0] == expected(12)
    bench.engine.stop()


def test_request_times_out_while_its_prefix_is_loading(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = threading.Event()
    fetch = bench.source.fetch

    def slow(key: PrefixKey) -> object:
        leave.wait(20)
        return fetch(key)

    monkeypatch.setattr(bench.source, "fetch", slow)
    _, events = bench.submit(prefix=PREFIX, timeout_s=0.01)
    end = answer(events)[1]
    leave.set()
    assert end.reason is FinishReason.TIMEOUT
    assert end.error == "the request's timeout of 0.01 s passed after 0 tokens of output"


def test_full_queue_refuses_but_admits_a_tenant_below_its_share() -> None:
    bench = Bench(max_waiting_tokens=68)
    backlog = [bench.submit()[1] for _ in range(4)]  # 17 tokens each; the engine has not started
    with pytest.raises(QueueFull, match="68 tokens wait, of at most 68") as refused:
        bench.submit()
    assert refused.value.retry_after >= 1
    _, second = bench.submit(tenant="second")
    bench.engine.start()
    assert answer(second)[0] == expected(12)
    ends = [answer(events)[1] for events in backlog]
    bench.engine.stop()
    assert [end.reason for end in ends] == 3 * [FinishReason.LENGTH] + [FinishReason.SHED]
    assert ends[-1].error == "the server is full: 85 tokens wait"
    assert ends[-1].retry_after is not None


def test_draining_engine_refuses_new_requests_and_finishes_running_ones(bench: Bench) -> None:
    _, events = bench.submit()
    bench.engine.drain()
    with pytest.raises(QueueFull, match="shutting down"):
        bench.submit()
    assert answer(events)[0] == expected(12)
    assert bench.engine.trouble == "the server is shutting down"


def test_debug_state_is_json_without_tokens(bench: Bench) -> None:
    bench.engine.set_pins([PREFIX])
    _, events = bench.submit(prefix=PREFIX)
    answer(events)
    state = bench.engine.state()
    assert state["prefixes"]["entries"][0]["digest"] == "digest"
    assert state["prefixes"]["entries"][0]["pinned"]
    assert bench.engine.tier(PREFIX.key) == "resident"
    assert json.loads(json.dumps(state)) == state


def test_failing_event_handler_does_not_affect_other_requests(bench: Bench) -> None:
    def raises(_: Event) -> None:
        raise ValueError("a caller's bug")

    request = AdmittedRequest(
        "bad", "t", PROMPT, None, SamplingParams(temperature=0), StopParams(max_tokens=3)
    )
    bench.engine.submit(request, raises)
    _, events = bench.submit()
    assert answer(events)[0] == expected(12)


def test_stop_aborts_running_requests() -> None:
    bench = Bench()
    _, events = bench.submit(max_tokens=150)
    bench.engine.start()
    assert isinstance(events.get(timeout=20), TokenEvent)
    bench.engine.stop()
    assert answer(events)[1].reason in {FinishReason.ABORT, FinishReason.LENGTH}
    assert not bench.engine.ready
    _, late = bench.submit()
    assert answer(late) == ("", FinishEvent(0, FinishReason.ABORT, 0))


def test_failing_debug_state_does_not_end_requests(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> dict[str, object]:
        raise LookupError("a bug in debug_state")

    monkeypatch.setattr("prefixd.server.engine.engine.debug_state", broken)
    _, events = bench.submit()
    with pytest.raises(LookupError):
        bench.engine.state()
    assert answer(events)[0] == expected(12)
    assert bench.engine.stats().restarts == 0


def test_failing_turn_ends_all_requests_and_the_engine_starts_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    bench.engine.set_pins([PREFIX])
    _, events = bench.submit()

    def broken(**_: object) -> Step:
        raise AssertionError("a bug in the scheduler")

    monkeypatch.setattr(bench.engine.core.scheduler, "schedule", broken)
    bench.engine.start()
    end = answer(events)[1]
    assert end.error == "the engine had to start over; please try again"
    _, after = bench.submit(prefix=PREFIX)
    assert answer(after)[0] == expected(12, "digest")
    assert bench.engine.stats().restarts == 1
    assert bench.engine.stats().pinned_prefixes == 1
    assert bench.engine.ready
    bench.engine.stop()


def test_engine_stops_after_repeated_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def broken(*_: object, **__: object) -> Step:
        raise AssertionError("a bug in the scheduler")

    monkeypatch.setattr("prefixd.server.engine.scheduler.Scheduler.schedule", broken)
    bench.engine.start()
    errors = [answer(bench.submit()[1])[1].error for _ in range(6)]
    assert errors[:5] == 5 * ["the engine had to start over; please try again"]
    assert errors[5] == "the engine stopped unexpectedly"
    bench.engine.stop()
    assert bench.engine.trouble == "the engine is not running"
    _, late = bench.submit()
    assert answer(late) == ("", FinishEvent(0, FinishReason.ABORT, 0))


def test_draws_are_uniform_and_depend_on_seed_and_index() -> None:
    draws = [seeded_uniform(seed, index) for seed in range(40) for index in range(50)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)


def test_stats_answer_while_a_step_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixd.server.engine.core._MAX_STATS_AGE_S", 0.0)
    entered, leave = threading.Event(), threading.Event()

    def when(step: Step) -> Exception | None:
        is_first_decode = bool(step.chunks) and len(step.chunks[0].tokens) == 1
        if is_first_decode:
            entered.set()
            leave.wait(20)
        return None

    fail_steps(bench, monkeypatch, when)
    _, events = bench.submit(prefix=PREFIX)
    assert entered.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr("prefixd.server.engine.engine._STATS_TIMEOUT_S", 0.01)
        stats = bench.engine.stats()
    leave.set()
    assert bench.engine.held_prefixes() == {PREFIX.key}
    assert (stats.running, stats.generated_tokens) == (1, 1)
    assert stats.blocks_total == 63
    assert answer(events)[0] == expected(12, "digest")
    assert bench.engine.stats().generated_tokens == 12


def test_stats_count_every_step_before_the_call(bench: Bench) -> None:
    for count in (1, 2, 3):
        _, events = bench.submit(max_tokens=4)
        answer(events)
        assert bench.engine.stats().generated_tokens == 4 * count
        assert bench.engine.stats().finished["length"] == count


def test_state_after_stop_shows_what_is_left() -> None:
    bench = Bench()
    bench.engine.start()
    _, events = bench.submit(prefix=PREFIX)
    answer(events)
    bench.engine.stop()
    state = bench.engine.state()
    assert state["running"]["count"] == 0
    assert [entry["digest"] for entry in state["prefixes"]["entries"]] == ["digest"]


def test_error_code_of_the_prefix_source_reaches_the_finish_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(_: PrefixKey) -> object:
        raise PrefixUnavailable("the store is unavailable", code=STORAGE_UNAVAILABLE)

    monkeypatch.setattr(bench.source, "fetch", unavailable)
    for _ in range(2):  # the second from the remembered failure
        _, events = bench.submit(prefix=PREFIX)
        end = answer(events)[1]
        assert (end.error, end.error_code) == ("the store is unavailable", STORAGE_UNAVAILABLE)
