"""Proposed tokens in a step: what they take, and what is kept of them."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.row_costs import RowCosts
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Chunk, Draft, Sampled, Step, StepOutput
from prefixd.server.testing import FakeRunner

BLOCK, PERIOD = 4, 5
PROMPT = (10, 11, 12, 13, 14, 10)
_ids = itertools.count()


class RepeatingRunner(FakeRunner):
    """After ``n`` tokens comes 10 + n % 5, but after ``turns_at`` tokens."""

    turns_at = -1

    def _next(self, table: object, length: int) -> int:
        super()._next(table, length)  # type: ignore[arg-type]  # it checks what is read
        return 99 if length == self.turns_at else 10 + length % PERIOD


@pytest.fixture(autouse=True)
def free_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps need not be measured."""
    monkeypatch.setattr(RowCosts, "needs_plain", lambda *_: False)


class Bench:
    """A scheduler that speculates, and its runner."""

    def __init__(self, *, num_blocks: int = 64, **config: int) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(num_blocks=num_blocks, block_size=BLOCK, speculate=True, **config),
            uniform=lambda seed, index: (seed + index) / 1000,
        )
        self.runner = RepeatingRunner(block_size=BLOCK)
        self.charged = 0
        charge = self.scheduler.waiting.charge

        def charge_and_count(tenant: str, tokens: int) -> None:
            self.charged += tokens
            charge(tenant, tokens)

        self.scheduler.waiting.charge = charge_and_count  # type: ignore[method-assign]

    def add(self, *, max_tokens: int = 20, **request: object) -> Sequence:
        number = next(_ids)
        stop = request.pop("stop", None) or StopParams(max_tokens=max_tokens)
        admitted = AdmittedRequest(
            request_id=str(number),
            tenant="t",
            prompt=PROMPT,
            prefix=None,
            sampling=SamplingParams(temperature=0),
            stop=stop,  # type: ignore[arg-type]
        )
        admitted = replace(admitted, **request)  # type: ignore[arg-type]
        sequence = Sequence(number, admitted, 0, 0, list(PROMPT))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.schedule()
        self.scheduler.update(step, self.runner.run(step))
        self.scheduler.check_integrity()
        return step

    def steps(self) -> Iterator[Step]:
        while not self.scheduler.idle:
            yield self.step()


def text(num_output: int) -> list[int]:
    return [10 + n % PERIOD for n in range(len(PROMPT), len(PROMPT) + num_output)]


def test_accepted_tokens_save_steps_and_each_token_is_charged_once() -> None:
    bench = Bench()
    sequence = bench.add()
    steps = list(bench.steps())
    assert sequence.tokens[len(PROMPT) :] == text(20)
    assert len(steps) < 10
    assert bench.charged == len(PROMPT) + 20
    longest = max(chunk.start + chunk.length for step in steps for chunk in step.chunks)
    assert longest == len(PROMPT) + 19, "no token is proposed past max_tokens"


def test_a_request_that_refuses_has_a_step_for_each_token() -> None:
    bench = Bench()
    bench.add(speculate=False)
    assert [step.num_drafts for step in bench.steps()] == [0] * 20


def test_rejected_tokens_leave_no_trace() -> None:
    bench = Bench()
    bench.runner.turns_at = 17
    sequence = bench.add()
    rejected = 0
    for step in bench.steps():
        rejected += step.num_drafts
        if not sequence.finished:
            assert sequence.num_computed == len(sequence.tokens) - 1
            assert len(sequence.block_table) <= -(-len(sequence.tokens) // BLOCK)
            assert sequence.num_remembered <= sequence.num_computed // BLOCK
    expected = text(20)
    expected[17 - len(PROMPT)] = 99
    assert sequence.tokens[len(PROMPT) :] == expected
    assert rejected > 0
    again = bench.add()
    bench.step()
    assert again.num_cached == len(PROMPT) // BLOCK * BLOCK
    list(bench.steps())
    assert again.tokens == sequence.tokens, "the reused blocks hold real tokens alone"


def test_drafts_take_only_free_blocks_and_preempt_none() -> None:
    bench = Bench(num_blocks=8)  # 28 positions
    first, second = bench.add(max_tokens=8), bench.add(max_tokens=8)
    drafted = sum(step.num_drafts for step in bench.steps())
    assert bench.scheduler.num_preemptions == 0
    assert drafted > 0
    assert first.tokens == second.tokens == [*PROMPT, *text(8)]


def test_drafts_get_what_the_budget_leaves() -> None:
    bench = Bench(max_tokens_per_step=10, max_running=4)
    sequences = [bench.add(max_tokens=40) for _ in range(2)]
    while (full := bench.step()).num_drafts != 8:
        assert full.num_tokens <= 10
    sequences.append(bench.add(kv_reuse=False))
    arriving = bench.step()
    assert [len(chunk.tokens) for chunk in arriving.chunks] == [1, 1, len(PROMPT)]
    assert arriving.num_drafts == 10 - 2 - len(PROMPT)
    assert all(step.num_tokens <= 10 for step in bench.steps())
    assert [each.tokens[len(PROMPT) :] for each in sequences] == [text(40), text(40), text(20)]


def test_a_stop_token_among_accepted_ones_ends_the_sequence_there() -> None:
    bench = Bench()
    stop = StopParams(max_tokens=20, min_tokens=8, token_ids=frozenset({13}))
    sequence = bench.add(stop=stop)
    list(bench.steps())
    assert sequence.tokens[-1] == 13
    assert sequence.num_output == 8 + text(20)[8:].index(13) + 1
    assert sequence.reason is FinishReason.STOP
    assert bench.charged == len(sequence.tokens)


def drafted_step(bench: Bench, sequence: Sequence) -> tuple[Step, StepOutput]:
    """A step with drafts, run and not yet applied."""
    for _ in range(20):
        step = bench.scheduler.schedule()
        output = bench.runner.run(step)
        if step.num_drafts >= 2:
            return step, output
        bench.scheduler.update(step, output)
    raise AssertionError(f"no step of {sequence} had a draft")


@pytest.mark.parametrize("num_finite", [0, 1])
def test_a_row_with_a_draft_that_is_not_finite_runs_again_without(num_finite: int) -> None:
    bench = Bench()
    sequence = bench.add()
    step, output = drafted_step(bench, sequence)
    new = output.sampled[sequence.seq_id]
    before = len(sequence.tokens)
    spoiled = [*new[:num_finite], Sampled(0, finite=False)]
    assert bench.scheduler.update(step, StepOutput({sequence.seq_id: spoiled})) == []
    assert len(sequence.tokens) == before + num_finite
    assert sequence.num_remaining == 1
    again = bench.scheduler.schedule()
    assert again.num_drafts == 0
    (ended,) = bench.scheduler.update(
        again, StepOutput({sequence.seq_id: [Sampled(0, finite=False)]})
    )
    assert ended.reason is FinishReason.ERROR
    bench.scheduler.check_integrity()


def test_what_follows_a_rejected_token_cannot_fail_the_row() -> None:
    chunk = Chunk(0, [1], 0, (1,), draft=Draft([5, 6], [0.0, 0.0]))
    good, bad = Sampled(7), Sampled(0, finite=False)
    assert chunk.verified([good, bad, bad]) == [good]
    assert chunk.verified([Sampled(5), bad, bad]) == [Sampled(5), bad]
    assert chunk.verified([Sampled(5), Sampled(6), good]) == [Sampled(5), Sampled(6), good]


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_failed_step_is_tried_without_drafts_before_its_sequence_ends(
    out_of_memory: bool,
) -> None:
    bench = Bench()
    sequence = bench.add()
    step, _ = drafted_step(bench, sequence)
    assert bench.scheduler.step_failed(step, "boom", out_of_memory=out_of_memory) == []
    drafts = [step.num_drafts for step in bench.steps()]
    assert drafts[0] == 0
    assert max(drafts) <= (step.num_drafts // 2 if out_of_memory else 8)
    assert sequence.tokens[len(PROMPT) :] == text(20)


def test_each_position_has_its_own_draw_history_and_bans() -> None:
    bench = Bench()
    sampling = SamplingParams(temperature=0.5, presence_penalty=0.5)
    stop = StopParams(max_tokens=20, min_tokens=9, token_ids=frozenset({99}))
    sequence = bench.add(sampling=sampling, stop=stop)
    step, _ = drafted_step(bench, sequence)
    (chunk,) = step.chunks
    num_output = sequence.num_output
    for ahead, position in enumerate(chunk.positions()):
        assert position.uniform == (num_output + ahead) / 1000
        assert position.history == (*sequence.tokens, *text(20)[num_output : num_output + ahead])
        assert position.banned == ((99,) if num_output + ahead < 9 else ())
