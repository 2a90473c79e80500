"""Which failures of a step count against readiness: those that no request explains."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from prefixd.server.engine.request import FinishReason, PrefixHandle, PrefixKey
from prefixd.server.engine.step import Step, StepOutput
from tests.engine.test_engine import PREFIX, PROMPT, Bench, answer, expected, fail_steps

pytestmark = pytest.mark.usefixtures("depth")

POISON = (66, 65, 68)
LOST = RuntimeError("device lost")


@pytest.fixture
def bench(depth: int) -> Bench:
    """Not started, so that a test can submit what its first step has."""
    assert Bench.depth == depth
    return Bench()


def is_poisoned(step: Step) -> Exception | None:
    is_here = any(tuple(chunk.tokens) == POISON for chunk in step.chunks)
    return RuntimeError("device lost") if is_here else None


def test_a_poisoned_request_a_hundred_times_leaves_the_engine_ready(
    bench: Bench, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(bench, monkeypatch, is_poisoned)
    bench.engine.start()
    for _ in range(100):
        _, events = bench.submit(prompt=POISON)
        end = answer(events)[1]
        assert (end.reason, end.error) == (FinishReason.ERROR, "the engine failed on this request")
        assert bench.engine.trouble is None
    assert answer(bench.submit()[1])[0] == expected(12)
    bench.engine.stop()
    # One behind, the next step is in flight at the first failure: so it is tried again alone.
    assert bench.engine.stats().step_failures == 100 * (1 + depth)
    bench.engine.core.scheduler.check_integrity()


def test_poisoned_requests_in_one_step_with_others_leave_the_engine_ready(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(bench, monkeypatch, is_poisoned)
    poisoned = [bench.submit(prompt=POISON, tenant="hostile")[1] for _ in range(6)]
    intact = [bench.submit()[1] for _ in range(2)]
    bench.engine.start()
    assert {answer(events)[1].reason for events in poisoned} == {FinishReason.ERROR}
    assert [answer(events)[0] for events in intact] == 2 * [expected(12)]
    assert bench.engine.trouble is None
    bench.engine.stop()


def test_prefixes_that_fail_to_compile_leave_the_engine_ready(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(bench, monkeypatch, lambda step: LOST if step.compiles else None)
    bench.engine.start()
    for number in range(10):
        bad = PrefixHandle(PrefixKey("hostile", f"bad {number}"), 5)
        bench.source.lengths[bad.key] = 5
        assert answer(bench.submit(prefix=bad)[1])[1].reason is FinishReason.ERROR
        assert bench.engine.trouble is None
    assert answer(bench.submit()[1])[0] == expected(12)
    bench.engine.stop()
    assert bench.engine.stats().step_failures == 10
    bench.engine.core.scheduler.check_integrity()


def test_prefixes_that_fail_to_load_leave_the_engine_ready(bench: Bench) -> None:
    bench.engine.start()
    for number in range(10):
        missing = PrefixHandle(PrefixKey("hostile", f"missing {number}"), 5)
        assert answer(bench.submit(prefix=missing)[1])[1].reason is FinishReason.ERROR
        assert bench.engine.trouble is None
    assert answer(bench.submit(prefix=PREFIX)[1])[0] == expected(12, "digest")
    bench.engine.stop()


def without_finite_logits(run: Callable[[Step], StepOutput]) -> Callable[[Step], StepOutput]:
    """A runner that fails on requests, and whose logits are NaN in a step of the bare base."""

    def run_step(step: Step) -> StepOutput:
        if step.chunks[0].seq_id >= 0:
            raise LOST
        output = run(step)
        sampled = {
            seq_id: [replace(new[0], finite=False)] for seq_id, new in output.sampled.items()
        }
        return StepOutput({**sampled})

    return run_step


def always_failing(_: Callable[[Step], StepOutput]) -> Callable[[Step], StepOutput]:
    def run_step(_: Step) -> StepOutput:
        raise LOST

    return run_step


@pytest.mark.parametrize(
    "broken", [always_failing, without_finite_logits], ids=["raises", "not finite"]
)
def test_a_runner_that_always_fails_makes_the_engine_not_ready_after_three_requests(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Callable[[Step], StepOutput]], Callable[[Step], StepOutput]],
) -> None:
    monkeypatch.setattr(bench.runner, "run", broken(bench.runner.run))
    bench.engine.start()
    for number in range(3):
        assert bench.engine.ready, number
        assert answer(bench.submit()[1])[1].reason is FinishReason.ERROR
    assert bench.engine.trouble == "the last 3 steps failed"
    bench.engine.stop()
    bench.engine.core.scheduler.check_integrity()


def test_a_device_that_stays_broken_makes_the_engine_not_ready(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an assertion on a CUDA device: every step after the poisoned one fails too."""
    broken = False

    def when(step: Step) -> Exception | None:
        nonlocal broken
        broken = broken or is_poisoned(step) is not None
        return LOST if broken else None

    fail_steps(bench, monkeypatch, when)
    bench.engine.start()
    assert answer(bench.submit()[1])[0] == expected(12)
    for prompt in (POISON, PROMPT, PROMPT):
        assert bench.engine.trouble is None
        assert answer(bench.submit(prompt=prompt)[1])[1].reason is FinishReason.ERROR
    assert bench.engine.trouble == "the last 3 steps failed"
    bench.engine.stop()


def test_requests_of_one_failed_step_count_once_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(bench, monkeypatch, lambda _: LOST)
    answers = [bench.submit()[1] for _ in range(5)]
    bench.engine.start()
    assert {answer(events)[1].reason for events in answers} == {FinishReason.ERROR}
    assert bench.engine.trouble == "the last 5 steps failed"
    bench.engine.stop()


def test_a_step_that_succeeds_makes_the_engine_ready_again(
    bench: Bench, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three requests, and a probe after each; before that, one behind, two steps in flight.
    failures = [LOST] * (6 + 6 * depth)
    fail_steps(bench, monkeypatch, lambda _: failures.pop() if failures else None)
    bench.engine.start()
    for _ in range(3):
        answer(bench.submit()[1])
    before = bench.engine.trouble
    assert answer(bench.submit()[1])[0] == expected(12)
    assert (before, bench.engine.trouble) == ("the last 3 steps failed", None)
    bench.engine.stop()


def test_a_failure_that_the_device_survived_counts_against_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each first step of a request fails; the step after it succeeds."""
    numbers = count()
    fail_steps(bench, monkeypatch, lambda _: None if next(numbers) % 2 else LOST)
    bench.engine.start()
    for _ in range(10):
        assert answer(bench.submit()[1])[1].reason is FinishReason.ERROR
        assert bench.engine.ready
    bench.engine.stop()


@pytest.mark.parametrize(
    "bad", [{"prompt": (120,)}, {"token_ids": frozenset({120})}], ids=["fed in", "masked"]
)
def test_the_fake_runner_refuses_ids_beyond_its_vocabulary(
    bench: Bench, bad: dict[str, Any]
) -> None:
    bench.runner.vocab_size = 120
    bench.engine.start()
    _, events = bench.submit(min_tokens=2, **bad)
    assert answer(events)[1].reason is FinishReason.ERROR
    assert bench.engine.ready
    bench.engine.stop()


def test_poisoned_requests_in_a_full_pool_leave_the_engine_ready(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe runs in the blocks that the failed request has freed."""
    fail_steps(bench, monkeypatch, is_poisoned)
    pinned = PrefixHandle(PrefixKey("t", "pinned"), 248)  # 62 of 63 blocks of 4
    bench.source.lengths[pinned.key] = 248
    bench.engine.core.set_pins((pinned,), None)
    bench.engine.start()
    assert answer(bench.submit(prefix=pinned, prompt=(65,), max_tokens=2)[1])[1].reason is (
        FinishReason.LENGTH
    )
    for _ in range(10):
        failed = bench.submit(prompt=POISON, max_tokens=1)[1]
        assert answer(failed)[1].reason is FinishReason.ERROR
        assert bench.engine.trouble is None
    bench.engine.stop()
    assert bench.engine.stats().step_failures == 10
