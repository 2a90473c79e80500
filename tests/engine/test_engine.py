"""The loop: events, stop conditions, aborts and failures, with the shipped fakes."""

import queue
from collections.abc import Iterator

import pytest

from server.engine.config import SchedulerConfig
from server.engine.engine import Engine, seeded_uniform
from server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from server.engine.step import Step, StepOutput
from server.testing import ByteDetokenizer, FakeRunner, FakeSource, fake_generate

PREFIX = PrefixHandle(PrefixKey("t", "digest"), 5)
PROMPT = tuple(b"hello")


class Bench:
    """An engine with its fakes and a way to wait for answers."""

    def __init__(self) -> None:
        self.runner = FakeRunner(block_size=4)
        self.source = FakeSource({PREFIX.key: 5})
        self.engine = Engine(
            config=SchedulerConfig(
                num_blocks=64, block_size=4, max_tokens_per_step=32, max_running=8
            ),
            runner=self.runner,
            source=self.source,
            detokenizer=ByteDetokenizer,
        )
        self.count = 0

    def submit(
        self, *, prefix: PrefixHandle | None = None, n: int = 1, **stop: object
    ) -> tuple[str, "queue.Queue[Event]"]:
        self.count += 1
        events: queue.Queue[Event] = queue.Queue()
        request = AdmittedRequest(
            request_id=f"r{self.count}",
            tenant="t",
            prompt=PROMPT,
            prefix=prefix,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(**{"max_tokens": 12, **stop}),  # type: ignore[arg-type]
            n=n,
        )
        self.engine.submit(request, events.put)
        return request.request_id, events


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.engine.start()
    yield bench
    bench.engine.stop()
    bench.engine.scheduler.check_integrity()
    assert bench.engine.scheduler.idle


def answer(events: "queue.Queue[Event]") -> tuple[str, FinishEvent]:
    text = ""
    while True:
        event = events.get(timeout=20)
        if isinstance(event, FinishEvent):
            return text, event
        text += event.text


def expected(count: int, digest: str | None = None) -> str:
    return bytes(fake_generate(digest, PROMPT, count)).decode()


def test_a_request_gets_its_own_prefix_and_ends_at_its_length(bench: Bench) -> None:
    _, base = bench.submit()
    _, mine = bench.submit(prefix=PREFIX)
    assert answer(base) == (expected(12), FinishEvent(0, FinishReason.LENGTH, 12))
    assert answer(mine) == (expected(12, "digest"), FinishEvent(0, FinishReason.LENGTH, 12))
    assert expected(12) != expected(12, "digest")


def test_n_sequences_of_one_request(bench: Bench) -> None:
    _, events = bench.submit(n=3)
    texts, ends = ["", "", ""], set()
    while len(ends) < 3:
        event = events.get(timeout=20)
        if isinstance(event, TokenEvent):
            texts[event.index] += event.text
        else:
            ends.add(event.index)
    assert texts == [expected(12)] * 3


def test_a_stop_token_ends_and_is_not_text(bench: Bench) -> None:
    text = expected(12)
    stop = text[6]
    _, events = bench.submit(token_ids=frozenset({ord(stop)}))
    got, end = answer(events)
    assert got == text[: text.index(stop)]
    assert (end.reason, end.stop) == (FinishReason.STOP, ord(stop))
    assert end.completion_tokens == text.index(stop) + 1


def test_a_stop_string_is_cut_and_never_leaks(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[5:8], "never there"))
    got, end = answer(events)
    assert got == text[:5]
    assert (end.reason, end.stop, end.completion_tokens) == (FinishReason.STOP, text[5:8], 8)


def test_a_stop_string_may_be_included(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[5:8],), include_stop_string=True)
    assert answer(events)[0] == text[:8]


def test_half_a_stop_string_at_the_end_goes_out(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[10:] + "!",))
    assert answer(events) == (text, FinishEvent(0, FinishReason.LENGTH, 12))


def test_min_tokens_holds_off_the_stop(bench: Bench) -> None:
    text = expected(12)
    _, events = bench.submit(strings=(text[2],), min_tokens=6)
    got, _ = answer(events)
    assert got.startswith(text[:6])


def test_an_abort_frees_everything_and_says_so(bench: Bench) -> None:
    request_id, events = bench.submit(prefix=PREFIX, max_tokens=150)
    while not isinstance(events.get(timeout=20), TokenEvent):
        pass
    bench.engine.abort(request_id)
    assert answer(events)[1].reason is FinishReason.ABORT
    bench.engine.abort("unknown ids are ignored")
    _, after = bench.submit()
    answer(after)
    stats = bench.engine.stats()
    assert stats.running == stats.waiting == 0


def test_a_prefix_that_cannot_be_had_fails_its_requests_alone(bench: Bench) -> None:
    gone = PrefixHandle(PrefixKey("t", "gone"), 3)
    _, failing = bench.submit(prefix=gone)
    _, fine = bench.submit(prefix=PREFIX)
    end = answer(failing)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, "the prefix is gone from the store")
    assert answer(fine)[0] == expected(12, "digest")


def test_a_source_that_breaks_shows_no_internals(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: PrefixKey) -> object:
        raise OSError("/secret/path")

    monkeypatch.setattr(bench.source, "fetch", broken)
    _, events = bench.submit(prefix=PREFIX)
    assert answer(events)[1].error == "the prefix could not be loaded"


def test_a_step_that_fails_ends_its_sequences_and_the_engine_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.runner.run
    failures = iter([True])

    def fails_once(step: Step) -> StepOutput:
        if next(failures, False):
            raise RuntimeError("device lost")
        return run(step)

    monkeypatch.setattr(bench.runner, "run", fails_once)
    _, first = bench.submit()
    end = answer(first)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, "the engine failed on this step")
    _, second = bench.submit()
    assert answer(second)[0] == expected(12)
    assert bench.engine.stats().step_failures == 1


def test_a_caller_whose_handler_fails_harms_nobody(bench: Bench) -> None:
    def raises(_: Event) -> None:
        raise ValueError("a caller's bug")

    request = AdmittedRequest(
        "bad", "t", PROMPT, None, SamplingParams(temperature=0), StopParams(max_tokens=3)
    )
    bench.engine.submit(request, raises)
    _, events = bench.submit()
    assert answer(events)[0] == expected(12)


def test_stopping_ends_what_is_alive() -> None:
    bench = Bench()
    _, events = bench.submit(max_tokens=150)
    bench.engine.start()
    assert isinstance(events.get(timeout=20), TokenEvent)
    bench.engine.stop()
    assert answer(events)[1].reason in {FinishReason.ABORT, FinishReason.LENGTH}
    assert not bench.engine.ready
    _, late = bench.submit()
    assert answer(late) == ("", FinishEvent(0, FinishReason.ABORT, 0))


def test_a_loop_that_dies_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    _, events = bench.submit()

    def broken() -> Step:
        raise AssertionError("a bug in the scheduler")

    monkeypatch.setattr(bench.engine.scheduler, "schedule", broken)
    bench.engine.start()
    end = answer(events)[1]
    assert (end.reason, end.error) == (FinishReason.ERROR, "the engine stopped unexpectedly")
    bench.engine.stop()
    assert not bench.engine.ready


def test_draws_are_even_and_depend_on_seed_and_index() -> None:
    draws = [seeded_uniform(seed, index) for seed in range(40) for index in range(50)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)
