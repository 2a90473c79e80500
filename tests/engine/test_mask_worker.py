"""Masks: begun when tokens are known, joined before sampling, on threads of their own."""

import itertools
import queue
import threading
from collections.abc import Callable, Collection

import pytest

from prefixd.server.engine.constraint import Constraint
from prefixd.server.engine.mask_worker import NUM_HELD, MaskWorker
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishReason,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Sampled, Step
from prefixd.server.testing import EOS
from tests.engine.constraints import LETTERS, Rule, alternating
from tests.engine.test_engine import PROMPT, Bench, answer, expected

GREEDY = SamplingParams(temperature=0)
Answer = tuple[str, FinishReason, str | None]


def request_of(
    constraint: Constraint, *, name: str = "r", tenant: str = "t", **stop: object
) -> AdmittedRequest:
    params = StopParams(**{"max_tokens": 12, **stop})  # type: ignore[arg-type]
    return AdmittedRequest(name, tenant, PROMPT, None, GREEDY, params, constraint=constraint)


@pytest.fixture(params=[0, 1])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(Bench, "depth", request.param)
    return Bench()


def run(bench: Bench, *requests: AdmittedRequest) -> list[Answer]:
    """The answers of constrained requests in the batch of a free one, whose answer is as alone."""
    queues: list[queue.Queue[Event]] = [queue.Queue() for _ in requests]
    for request, events in zip(requests, queues, strict=True):
        bench.engine.submit(request, events.put)
    _, free = bench.submit()
    bench.engine.start()
    ended = [answer(events) for events in queues]
    assert answer(free)[0] == expected(12)
    bench.engine.stop()
    bench.engine.core.scheduler.check_integrity()
    assert bench.engine.stats().restarts == 0
    return [(text, end.reason, end.error) for text, end in ended]


def test_rows_follow_their_own_constraints(bench: Bench) -> None:
    vowels = Rule(lambda output: b"aeiou" if len(output) < 6 else b".")
    texts = run(bench, request_of(alternating()), request_of(vowels, name="s"))
    assert [reason for _, reason, _ in texts] == [FinishReason.LENGTH, FinishReason.LENGTH]
    assert set(texts[1][0]) <= set("aeiou.")
    assert texts[1][0].endswith("......")
    for before, after in itertools.pairwise(texts[0][0].encode()):
        allowed = alternating().allowed_after((before,))
        assert allowed is not None
        assert after in allowed


def test_complete_output_ends_with_stop_where_no_token_may_end_it(bench: Bench) -> None:
    rule = Rule(lambda output: None if len(output) == 3 else b"xyz")
    [(text, reason, error)] = run(bench, request_of(rule))
    assert (len(text), reason, error) == (3, FinishReason.STOP, None)


def test_end_token_of_a_complete_output_is_sampled_and_not_shown(bench: Bench) -> None:
    rule = Rule(lambda output: [EOS] if len(output) == 3 else b"xyz")
    request = request_of(rule, token_ids=frozenset({EOS}))
    [(text, reason, _)] = run(bench, request)
    assert (len(text), reason) == (3, FinishReason.STOP)


def test_min_tokens_bans_the_end_in_the_mask(bench: Bench) -> None:
    rule = Rule(lambda output: [EOS, *b"xyz"] if output else [EOS, ord("x")])
    request = request_of(rule, token_ids=frozenset({EOS}), min_tokens=4)
    [(text, reason, _)] = run(bench, request)
    assert len(text) >= 4
    assert reason is FinishReason.LENGTH, "letters come before the end in a fake"


class Panic(BaseException):
    """As of a library in Rust."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "no token may follow"),
        (ValueError("secret"), "the engine failed on this request"),
        (Panic("secret"), "the engine failed on this request"),
    ],
)
def test_constraint_that_fails_ends_its_request_alone(
    bench: Bench, error: BaseException | None, message: str
) -> None:
    def allowed_after(output: tuple[int, ...]) -> Collection[int]:
        if len(output) == 2 and error is not None:
            raise error
        return LETTERS if len(output) < 2 else ()

    [(text, reason, said)] = run(bench, request_of(Rule(allowed_after)))
    assert (text, reason, said) == (expected(2), FinishReason.ERROR, message)


def test_masks_are_the_same_after_a_failed_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(text, *_)] = run(bench, request_of(alternating()))
    second = Bench()
    fake_run, numbers = second.runner.run, iter(range(100))

    def fail_once(step: Step) -> object:
        if next(numbers) == 3:
            raise RuntimeError("injected")
        return fake_run(step)

    monkeypatch.setattr(second.runner, "run", fail_once)
    [(again, reason, _)] = run(second, request_of(alternating()))
    assert (again, reason) == (text, FinishReason.LENGTH)
    assert second.engine.stats().step_failures == 1


# -- slow masks ----


class Clock:
    """CPU time that a test moves, on whichever thread computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Gated(Rule):
    """A constraint whose masks after the first take ``seconds``, and come when ``gate`` is set."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__(self._after)
        self.gate, self._clock, self._seconds = threading.Event(), clock, seconds

    def _after(self, output: tuple[int, ...]) -> Collection[int]:
        if output:
            assert self.gate.wait(20)
            self._clock.now += self._seconds
        return LETTERS


def sequence(seq_id: int, constraint: Constraint, *, tenant: str) -> Sequence:
    request = request_of(constraint, name=f"{seq_id}", tenant=tenant)
    return Sequence(seq_id, request, 0, 0, list(PROMPT))


def worker_of(clock: Clock) -> tuple[MaskWorker, "queue.Queue[None]"]:
    woken: queue.Queue[None] = queue.Queue()
    return MaskWorker(wake=lambda: woken.put(None), clock=clock), woken


def step_of(*sequences: Sequence) -> Step:
    return Step(masked=[each.seq_id for each in sequences])


def token(*sequences: Sequence) -> dict[int, list[Sampled]]:
    return {each.seq_id: [Sampled(ord("a"))] for each in sequences}


def test_sequences_of_a_tenant_with_slow_masks_wait_outside_of_steps() -> None:
    clock = Clock()
    worker, woken = worker_of(clock)
    slow, fast = Gated(clock, 0.5), Gated(clock, 0.0)
    fast.gate.set()
    hostile, other = sequence(0, slow, tenant="hostile"), sequence(1, fast, tenant="other")
    both = step_of(hostile, other)
    for each in (hostile, other):
        worker.open(each)
    assert set(worker.join(both)()) == {0, 1}
    assert not worker.holds(hostile), "its masks were fast so far"

    worker.advance(both, token(hostile, other))
    slow.gate.set()
    assert set(worker.join(both)()) == {0, 1}
    woken.get(timeout=20)
    slow.gate.clear()
    worker.advance(both, token(hostile, other))
    assert worker.holds(hostile)
    assert not worker.holds(other)
    slow.gate.set()
    woken.get(timeout=20)
    assert not worker.holds(hostile), "its mask is there"
    hostile.num_pending = 1
    assert worker.holds(hostile), "its next mask depends on a token that is not known"
    worker.stop()


def test_masks_of_a_slow_tenant_come_after_those_of_others() -> None:
    clock = Clock()
    worker, woken = worker_of(clock)
    slow, fast = Gated(clock, 0.5), Gated(clock, 0.0)
    slow.gate.set()
    fast.gate.set()
    hostile = [sequence(index, slow, tenant="hostile") for index in range(3)]
    other = sequence(9, fast, tenant="other")
    for each in (*hostile, other):
        worker.open(each)
    everything = step_of(*hostile, other)
    worker.join(everything)()
    worker.advance(step_of(hostile[0]), token(hostile[0]))  # slow
    woken.get(timeout=20)
    slow.gate.clear()
    worker.advance(everything, token(*hostile))
    worker.advance(everything, token(other))
    slow.gate.set()
    assert set(worker.join(step_of(other))()) == {9}
    worker.join(everything)()
    assert slow.outputs[-1], "the last mask that was computed is a slow one"
    worker.stop()


def test_a_tenant_is_trusted_again_after_fast_masks() -> None:
    clock = Clock()
    worker, woken = worker_of(clock)
    gated = Gated(clock, 0.5)
    gated.gate.set()
    one = sequence(0, gated, tenant="t")
    worker.open(one)
    step = step_of(one)
    worker.join(step)()
    worker.advance(step, token(one))
    woken.get(timeout=20)
    gated._seconds = 0.0
    for count in range(NUM_HELD):
        one.num_pending = 1
        assert worker.holds(one), count
        worker.advance(step, token(one))
        worker.join(step)()
        woken.get(timeout=20)
    assert not worker.holds(one)
    worker.stop()


def test_engine_runs_held_sequences_when_their_masks_come(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No poll: the worker wakes the engine. A slow tenant's answer is the same."""
    monkeypatch.setattr("prefixd.server.engine.mask_worker.SLOW_S", -1.0)
    polls: list[float | None] = []
    idle: Callable[[], float | None] = bench.engine.core.idle_timeout

    def never_polls() -> float | None:
        polls.append(idle())
        return None

    monkeypatch.setattr(bench.engine.core, "idle_timeout", never_polls)
    [(text, reason, _)] = run(bench, request_of(alternating()))
    assert (len(text), reason) == (12, FinishReason.LENGTH)
    assert text == run(Bench(), request_of(alternating()))[0][0]
