"""One step behind: a step is planned and submitted before the output of the last one is known."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Stage
from prefixd.server.engine.request import (
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
from prefixd.server.engine.row_costs import RowCosts
from prefixd.server.engine.runner import Masks, OutOfMemory
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import End
from prefixd.server.engine.sequence import Sequence as Generated
from prefixd.server.engine.step import Chunk, Sampled, Step, StepOutput
from prefixd.server.testing import FakeRunner, FakeStaged, fake_generate
from tests.engine.constraints import Rule, alternating, masks
from tests.engine.test_engine import PROMPT, Bench, answer, expected

GREEDY = SamplingParams(temperature=0)
LETTERS = frozenset(range(ord("a"), ord("n")))


class Journal(FakeRunner):
    """A FakeRunner that notes its calls. With ``repeats`` the text of every second request is
    of two letters, so that it can be proposed."""

    repeats = False

    def __init__(self, *, depth: int) -> None:
        super().__init__(block_size=4, depth=depth)
        self.notes: list[str] = []
        self.num_submitted = self.num_collected = 0

    def submit(self, step: Step) -> None:
        self.num_submitted += 1
        self.notes.append(f"submit {self.num_submitted}")
        super().submit(step)

    def complete(self, masks: Callable[[], Masks]) -> None:
        self.notes.append(f"complete {self.num_submitted}")
        super().complete(masks)

    def collect(self) -> StepOutput:
        self.num_collected += 1
        self.notes.append(f"collect {self.num_collected}")
        return super().collect()

    def _sample(self, chunk: Chunk, num_drafts: int) -> Sampled:
        sampled = super()._sample(chunk, num_drafts)
        if self.repeats and chunk.seq_id % 2 and not chunk.banned:
            sampled = replace(sampled, token_id=ord("a") + sampled.token_id % 2)
        return sampled


class Simulation:
    """A scheduler and a runner, driven as the engine drives them."""

    def __init__(self, *, depth: int, **config: int | bool) -> None:
        defaults: dict[str, int | bool] = {"num_blocks": 64, "block_size": 4, "max_running": 8}
        defaults |= {"max_tokens_per_step": 32}
        self.scheduler = Scheduler(SchedulerConfig(**{**defaults, **config}))  # type: ignore[arg-type]
        self.runner = Journal(depth=depth)
        self.ids = itertools.count()
        self.ended: dict[int, Generated] = {}
        self.rows: Counter[int] = Counter()

    def add(
        self,
        *,
        prompt: Sequence[int] = PROMPT,
        prefix: PrefixHandle | None = None,
        sampling: SamplingParams = GREEDY,
        constraint: Rule | None = None,
        speculate: bool = False,
        **stop: object,
    ) -> Generated:
        number = next(self.ids)
        request = AdmittedRequest(
            request_id=str(number),
            tenant="t",
            prompt=tuple(prompt),
            prefix=prefix,
            sampling=sampling,
            stop=StopParams(**{"max_tokens": 12, **stop}),  # type: ignore[arg-type]
            constraint=constraint,
            speculate=speculate,
        )
        sequence = Generated(number, request, 0, 0, list(prompt))
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> Step:
        step = self.scheduler.schedule()
        self.rows.update(chunk.seq_id for chunk in step.chunks)
        if step.has_work:
            self.runner.submit(step)
        return step

    def collect(self) -> None:
        output = self.runner.collect()
        for sequence in self.scheduler.update(self.scheduler.in_flight[0], output):
            self.ended[sequence.seq_id] = sequence
        self.scheduler.check_integrity()

    def turn(self) -> Step:
        step = self.plan()
        in_flight = self.scheduler.in_flight
        while in_flight and in_flight[0] is not step:
            self.collect()
        if step.masked:
            self.runner.complete(lambda: masks(self.scheduler, step))
        if in_flight and not self.runner.depth:
            self.collect()
        return step

    def finish(self) -> None:
        while not self.scheduler.idle or self.scheduler.in_flight:
            self.turn()


def test_mixed_rows_get_the_same_tokens_one_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowCosts, "needs_plain", lambda *_: False)
    monkeypatch.setattr(RowCosts, "slowdown", lambda *_: 1.0)

    def outputs(depth: int) -> tuple[list[list[int]], list[FinishReason | None], Simulation]:
        simulation = Simulation(depth=depth, speculate=True)
        simulation.runner.repeats = True
        rows = [
            simulation.add(max_tokens=20),
            simulation.add(max_tokens=40, speculate=True),
            simulation.add(max_tokens=20, constraint=alternating()),
            simulation.add(max_tokens=40, speculate=True, min_tokens=4, token_ids=frozenset({99})),
            simulation.add(max_tokens=20, min_tokens=9, token_ids=LETTERS),
            simulation.add(max_tokens=1),
        ]
        simulation.finish()
        drafts = sum(step.num_drafts for step in simulation.runner.steps)
        assert drafts, "nothing was speculated"
        tokens = [sequence.tokens[sequence.num_prompt :] for sequence in rows]
        return tokens, [sequence.reason for sequence in rows], simulation

    at_once, reasons, _ = outputs(0)
    behind, reasons_behind, simulation = outputs(1)
    assert behind == at_once
    assert reasons_behind == reasons
    assert reasons[4] is FinishReason.STOP
    chunks = [chunk for step in simulation.runner.steps for chunk in step.chunks]
    assert {chunk.seq_id for chunk in chunks if chunk.is_pending} >= {0, 2, 4}
    for step, following in itertools.pairwise(simulation.runner.steps):
        verifying = {chunk.seq_id for chunk in step.chunks if chunk.draft is not None}
        assert not verifying & {chunk.seq_id for chunk in following.chunks}


def test_only_masked_rows_wait_for_the_tokens_of_the_step_before() -> None:
    simulation, constraint = Simulation(depth=1), alternating()
    masked = simulation.add(constraint=constraint, max_tokens=3)
    simulation.add(max_tokens=3)
    simulation.finish()
    assert simulation.runner.notes == [
        *("submit 1", "complete 1"),
        *("submit 2", "collect 1", "complete 2"),
        *("submit 3", "collect 2", "complete 3"),
        "collect 3",
    ]
    output = tuple(masked.tokens[masked.num_prompt :])
    assert constraint.outputs == [output[:count] for count in range(3)]


def test_row_that_ends_by_max_tokens_runs_no_further_step() -> None:
    simulation = Simulation(depth=1)
    short, long = simulation.add(max_tokens=2), simulation.add(max_tokens=6)
    simulation.finish()
    assert simulation.rows == {short.seq_id: 2, long.seq_id: 6}


def test_row_that_ended_by_a_stop_token_is_dropped() -> None:
    simulation = Simulation(depth=1)
    (first,) = fake_generate(None, PROMPT, 1)
    sequence = simulation.add(token_ids=frozenset({first}))
    simulation.finish()
    assert sequence.tokens == [*PROMPT, first]
    assert sequence.reason is FinishReason.STOP
    assert simulation.rows == {sequence.seq_id: 2}, "the second row was planned before the end"
    assert simulation.scheduler.memory.pool.num_free == 63


def test_history_is_without_the_pending_token() -> None:
    simulation = Simulation(depth=1)
    sampling = SamplingParams(temperature=0, presence_penalty=1.0)
    sequence = simulation.add(sampling=sampling, max_tokens=4)
    simulation.finish()
    histories = [chunk.history for step in simulation.runner.steps for chunk in step.chunks]
    lengths = [len(PROMPT), len(PROMPT), len(PROMPT) + 1, len(PROMPT) + 2]
    assert histories == [tuple(sequence.tokens[:length]) for length in lengths]


def test_draws_and_bans_of_pending_rows_are_those_of_their_position() -> None:
    drawn: list[int] = []
    simulation = Simulation(depth=1)
    simulation.scheduler._builder._uniform = lambda _seed, index: drawn.append(index) or 0.0  # type: ignore[func-returns-value]
    simulation.add(
        sampling=SamplingParams(temperature=1.0), max_tokens=5, min_tokens=3, token_ids=LETTERS
    )
    for _ in range(4):
        simulation.turn()
    chunks = [chunk for step in simulation.runner.steps for chunk in step.chunks]
    assert drawn[:4] == [0, 1, 2, 3]
    assert [bool(chunk.banned) for chunk in chunks] == [True, True, True]


def test_preempted_sequence_keeps_the_token_that_was_in_flight() -> None:
    simulation = Simulation(depth=1)
    sequence = simulation.add(max_tokens=6)
    simulation.turn()
    simulation.turn()
    simulation.scheduler.preempt(sequence)
    simulation.scheduler.check_integrity()
    assert (len(sequence.tokens), sequence.num_pending) == (len(PROMPT) + 1, 1)
    step = simulation.turn()
    assert not step.chunks, "it starts when its token has come"
    assert (len(sequence.tokens), sequence.num_pending) == (len(PROMPT) + 2, 0)
    chunk = simulation.turn().chunks[0]
    assert list(chunk.tokens) == sequence.tokens[chunk.start :]
    simulation.finish()
    assert sequence.tokens[len(PROMPT) :] == fake_generate(None, PROMPT, 6)


def test_blocks_of_a_step_in_flight_are_not_registered_for_reuse() -> None:
    """A block is, once the step that filled it was collected."""
    simulation = Simulation(depth=1)
    simulation.add(max_tokens=8, prompt=(1, 2, 3))
    pool = simulation.scheduler.memory.pool
    simulation.turn()  # three tokens, in flight
    simulation.turn()  # the fourth fills the block, in flight; the first step was collected
    assert not pool._names
    simulation.turn()
    assert len(pool._names) == 1


def test_blocks_are_registered_up_to_the_last_step_collected() -> None:
    simulation = Simulation(depth=1)
    simulation.add(max_tokens=8, prompt=range(7))
    simulation.turn()  # fills the first block
    simulation.turn()  # fills the second one, in flight
    assert len(simulation.scheduler.memory.pool._names) == 1


def test_non_finite_token_of_a_preempted_sequence_removes_its_blocks_from_reuse() -> None:
    simulation = Simulation(depth=1)
    sequence = simulation.add(max_tokens=8, prompt=range(6))
    simulation.turn()
    simulation.turn()
    pool = simulation.scheduler.memory.pool
    assert len(pool._names) == 1
    simulation.scheduler.preempt(sequence)
    output = StepOutput({0: [Sampled(0, finite=False)]})
    assert simulation.scheduler.update(simulation.scheduler.in_flight[0], output) == [sequence]
    assert sequence.reason is FinishReason.ERROR
    assert not pool._names
    simulation.scheduler.check_integrity()


def test_step_in_flight_behind_a_failed_one_is_discarded() -> None:
    simulation = Simulation(depth=1)
    rows = [simulation.add(max_tokens=8) for _ in range(2)]
    simulation.turn()
    simulation.turn()
    first, second = simulation.scheduler.in_flight[0], simulation.plan()
    simulation.runner._submitted.clear()
    assert simulation.scheduler.step_failed(first, "boom") == []
    simulation.scheduler.check_integrity()
    assert second.chunks
    assert [len(row.tokens) for row in rows] == 2 * [len(PROMPT) + 1]
    assert simulation.scheduler.recovery.suspects.keys() == set(rows)
    for row in rows:
        step = simulation.plan()
        assert [chunk.seq_id for chunk in step.chunks] == [row.seq_id]
        simulation.collect()
    simulation.finish()
    for row in rows:
        assert row.tokens[len(PROMPT) :] == fake_generate(None, PROMPT, 8)


def test_smallest_step_that_fails_with_another_behind_it_ends_no_request() -> None:
    simulation = Simulation(depth=1)
    first = simulation.add(max_tokens=8)
    failing = simulation.plan()
    second = simulation.add(max_tokens=8)
    behind = simulation.plan()
    assert failing.is_smallest
    assert {chunk.seq_id for chunk in behind.chunks} == {first.seq_id, second.seq_id}
    simulation.runner._submitted.clear()
    assert simulation.scheduler.step_failed(failing, "boom") == []
    assert list(simulation.scheduler.recovery.suspects) == [first, second]
    alone = simulation.plan()
    assert simulation.scheduler.step_failed(alone, "boom") == [first]


def test_compile_in_flight_counts_for_nothing_when_its_blocks_were_taken() -> None:
    simulation, handle = Simulation(depth=1), PrefixHandle(PrefixKey("t", "digest"), 8)
    simulation.add(prefix=handle, max_tokens=2)
    (key,) = simulation.plan().fetches
    simulation.scheduler.prefix_staged(key, FakeStaged(8))
    residency = simulation.scheduler.memory.residency
    entry = residency.get(key)
    assert entry is not None
    assert simulation.plan().compiles
    residency.unplace(entry)  # as for the next block of a running sequence
    assert simulation.plan().compiles, "the compile starts over"
    stages = []
    for _ in range(2):
        simulation.collect()
        stages.append(entry.stage)
        assert not simulation.plan().compiles, "all of it is in flight"
    assert stages == [Stage.COMPILING, Stage.RESIDENT]
    simulation.finish()
    assert simulation.ended[0].reason is FinishReason.LENGTH


def test_smallest_step_without_memory_runs_alone_before_it_ends() -> None:
    """With another in flight it may have lacked memory for both."""
    simulation = Simulation(depth=1)
    sequence = simulation.add(max_tokens=8)
    simulation.turn()
    step = simulation.scheduler.schedule()
    simulation.collect()
    failed = simulation.scheduler.step_failed
    assert failed(step, "no memory", out_of_memory=True, alone=False) == []
    assert list(simulation.scheduler.recovery.suspects) == [sequence]
    simulation.runner._submitted.clear()
    step = simulation.scheduler.schedule()
    simulation.scheduler.recovery.backoff.max_chunk = 1
    step.chunks[0].tokens = step.chunks[0].tokens[:1]
    assert failed(step, "no memory", out_of_memory=True) == [sequence]


def test_parts_of_a_step_without_memory_that_cannot_be_halved_run_alone() -> None:
    """One of them may be why it lacks memory, and the other not."""
    simulation, handle = Simulation(depth=0), PrefixHandle(PrefixKey("t", "digest"), 1)
    rows = simulation.add(max_tokens=8), simulation.add(prefix=handle, max_tokens=2)
    (key,) = simulation.turn().fetches
    simulation.scheduler.prefix_staged(key, FakeStaged(1))
    step = simulation.plan()
    assert (len(step.chunks), step.num_tokens, step.num_compiled) == (1, 2, 1)
    simulation.runner._submitted.clear()
    assert simulation.scheduler.step_failed(step, "no memory", out_of_memory=True) == []
    assert [simulation.turn().num_parts for _ in range(2)] == [1, 1]
    simulation.finish()
    assert [row.reason for row in rows] == 2 * [FinishReason.LENGTH]


def test_aborted_sequence_with_a_step_in_flight_gets_no_more_tokens() -> None:
    simulation = Simulation(depth=1)
    aborted, other = simulation.add(), simulation.add()
    simulation.turn()
    simulation.turn()
    simulation.scheduler.end(aborted, End(FinishReason.ABORT))
    simulation.scheduler.check_integrity()
    simulation.finish()
    assert len(aborted.tokens) == len(PROMPT) + 1
    assert other.tokens[len(PROMPT) :] == fake_generate(None, PROMPT, 12)
    assert simulation.scheduler.memory.pool.num_free == 63


# -- the engine ----


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An engine one step behind, not started."""
    monkeypatch.setattr(Bench, "depth", 1)
    return Bench()


def test_each_step_is_submitted_before_the_tokens_of_the_one_before_are_delivered(
    behind: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, submitted, delivered = behind.runner.submit, itertools.count(1), []
    num_submitted, ended = 0, threading.Event()

    def count(step: Step) -> None:
        nonlocal num_submitted
        num_submitted = next(submitted)
        submit(step)

    def on_event(event: Event) -> None:
        if isinstance(event, FinishEvent):
            ended.set()
        elif isinstance(event, TokenEvent) and event.token_ids:
            delivered.append(num_submitted)

    monkeypatch.setattr(behind.runner, "submit", count)
    request = AdmittedRequest(
        "r", "t", PROMPT, None, SamplingParams(temperature=0), StopParams(max_tokens=20)
    )
    behind.engine.submit(request, on_event)
    behind.engine.start()
    assert ended.wait(20)
    behind.engine.stop()
    assert delivered == [*range(2, 21), 20], "token k comes when step k + 1 is submitted"


def test_submit_that_fails_leaves_the_step_before_it_intact(
    behind: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, numbers = behind.runner.submit, itertools.count()

    def fail_the_fourth(step: Step) -> None:
        if next(numbers) == 3:
            raise OutOfMemory("injected")
        submit(step)

    monkeypatch.setattr(behind.runner, "submit", fail_the_fourth)
    answers = [behind.submit()[1] for _ in range(2)]
    behind.engine.start()
    assert [answer(events)[0] for events in answers] == 2 * [expected(12)]
    behind.engine.stop()
    assert behind.engine.stats().out_of_memory == 1
    behind.engine.core.scheduler.check_integrity()


@pytest.mark.parametrize("error", [RuntimeError, OutOfMemory])
def test_last_step_in_flight_that_fails_ends_no_request(
    behind: Bench, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """It was submitted while another was in flight, and may have failed because of that one."""
    run, numbers = behind.runner.run, itertools.count()

    def fail_the_last(step: Step) -> StepOutput:
        if next(numbers) == 11:
            raise error("injected")
        return run(step)

    monkeypatch.setattr(behind.runner, "run", fail_the_last)
    _, events = behind.submit()
    behind.engine.start()
    assert answer(events)[0] == expected(12)
    behind.engine.stop()


def test_both_steps_in_flight_fail_and_no_request_ends(
    behind: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that reports the failure of a step when the one before is collected."""
    run, numbers = behind.runner.run, itertools.count()

    def fail_two(step: Step) -> StepOutput:
        if next(numbers) in {3, 4}:
            raise RuntimeError("injected")
        return run(step)

    monkeypatch.setattr(behind.runner, "run", fail_two)
    answers = [behind.submit()[1] for _ in range(3)]
    behind.engine.start()
    assert [answer(events)[0] for events in answers] == 3 * [expected(12)]
    behind.engine.stop()
    assert behind.engine.stats().step_failures == 1
    assert behind.engine.stats().generated_tokens == 36


def test_stop_collects_what_is_in_flight(behind: Bench) -> None:
    first_token = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, TokenEvent):
            first_token.set()

    request = AdmittedRequest(
        "r", "t", PROMPT, None, SamplingParams(temperature=0), StopParams(max_tokens=200)
    )
    behind.engine.submit(request, on_event)
    behind.engine.start()
    assert first_token.wait(20)
    behind.engine.stop()
    assert not behind.runner._submitted
    assert behind.engine.core.scheduler.idle
    behind.engine.core.scheduler.check_integrity()


def test_engine_starts_over_with_a_step_in_flight(
    behind: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, numbers = behind.engine.core.scheduler.schedule, itertools.count()

    def fail_the_fifth(**values: float) -> Step:
        if next(numbers) == 4:
            raise AssertionError("a bug in the scheduler")
        return schedule(**values)

    monkeypatch.setattr(behind.engine.core.scheduler, "schedule", fail_the_fifth)
    _, events = behind.submit()
    behind.engine.start()
    assert answer(events)[1].error == "the engine had to start over; please try again"
    assert answer(behind.submit()[1])[0] == expected(12)
    behind.engine.stop()
    assert not behind.runner._submitted
