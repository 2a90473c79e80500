"""Scores of prompt tokens: each comes once and in order, also after preemptions and failures."""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    PromptScore,
    SamplingParams,
    ScoreEvent,
    Scoring,
    StopParams,
    TokenEvent,
)
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.testing import (
    ByteDetokenizer,
    FakeRunner,
    FakeSource,
    fake_generate,
    fake_next_token,
    fake_score,
)

PREFIX = PrefixHandle(PrefixKey("t", "digest"), 5)
GATED = PrefixHandle(PrefixKey("t", "gated"), 3, gated=True)
PROMPT = tuple(b"the quick brown fox jumps")


@dataclass
class Answer:
    """What one sequence sent."""

    places: list[int] = field(default_factory=list)
    scores: list[PromptScore] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: FinishEvent | None = None


class Bench:
    """An engine over fakes; ``runner`` keeps the steps it ran."""

    def __init__(self, depth: int, *, max_scored: int = 6, num_blocks: int = 64) -> None:
        self.runner = FakeRunner(block_size=4, depth=depth)
        self.engine = Engine(
            config=SchedulerConfig(
                num_blocks=num_blocks,
                block_size=4,
                max_tokens_per_step=32,
                max_prefill_chunk=9,
                max_scored=max_scored,
                max_running=8,
            ),
            runner=self.runner,
            source=FakeSource({PREFIX.key: 5, GATED.key: 3}, gated={GATED.key}),
            detokenizer=ByteDetokenizer,
        )
        self.count = 0

    def submit(
        self,
        scoring: Scoring | None,
        *,
        prompt: Sequence[int] = PROMPT,
        prefix: PrefixHandle | None = None,
        max_tokens: int = 3,
        n: int = 1,
        kv_reuse: bool = True,
    ) -> "queue.Queue[Event]":
        self.count += 1
        events: queue.Queue[Event] = queue.Queue()
        request = AdmittedRequest(
            f"r{self.count}",
            "t",
            tuple(prompt),
            prefix,
            SamplingParams(temperature=0),
            StopParams(max_tokens=max_tokens),
            n=n,
            kv_reuse=kv_reuse,
            scoring=scoring,
        )
        self.engine.submit(request, events.put)
        return events

    def computed(self, seq_id: int) -> int:
        """Prompt tokens of a sequence that were run, and not found in the pool."""
        chunks = [chunk for step in self.runner.steps for chunk in step.chunks]
        return sum(len(chunk.tokens) for chunk in chunks if chunk.seq_id == seq_id)


@pytest.fixture(params=[0, 1], ids=["at once", "one behind"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.engine.stop()
    bench.engine.core.scheduler.check_integrity()


def answers(events: "queue.Queue[Event]", n: int = 1) -> list[Answer]:
    """What all sequences of a request sent; scores come before tokens."""
    answers = [Answer() for _ in range(n)]
    while any(answer.end is None for answer in answers):
        event = events.get(timeout=20)
        answer = answers[event.index]
        if isinstance(event, ScoreEvent):
            assert not answer.tokens
            answer.places += range(event.place, event.place + len(event.scores))
            answer.scores += event.scores
        elif isinstance(event, TokenEvent):
            answer.tokens += event.token_ids
        else:
            answer.end = event
    return answers


def expected(prompt: Sequence[int], start: int, digest: str | None = None) -> list[float]:
    return [fake_score(digest, prompt[:i], prompt[i]) for i in range(start, len(prompt))]


def check(answer: Answer, prompt: Sequence[int], start: int, digest: str | None = None) -> None:
    assert answer.places == list(range(start, len(prompt)))
    assert [score.logprob for score in answer.scores] == expected(prompt, start, digest)


@pytest.mark.parametrize("prefix", [None, PREFIX, GATED], ids=["base", "prefix", "gated"])
@pytest.mark.parametrize("start", [1, 8, len(PROMPT) - 1])
def test_each_token_from_the_start_is_scored_once_and_in_order(
    bench: Bench, prefix: PrefixHandle | None, start: int
) -> None:
    digest = prefix.key.digest if prefix else None
    bench.engine.start()
    scored = bench.submit(Scoring(start, top=2), prefix=prefix)
    plain = bench.submit(None, prefix=prefix)
    for events, is_scored in ((scored, True), (plain, False)):
        (answer,) = answers(events)
        assert answer.tokens == fake_generate(digest, PROMPT, 3)
        check(answer, PROMPT, start if is_scored else len(PROMPT), digest)
    for chunk in (chunk for step in bench.runner.steps for chunk in step.chunks):
        assert chunk.targets is None or len(chunk.targets.tokens) <= 6


def test_scores_hold_what_else_was_likely(bench: Bench) -> None:
    likely = fake_next_token(None, PROMPT)
    bench.engine.start()
    (answer,) = answers(bench.submit(Scoring(len(PROMPT), top=2), prompt=(*PROMPT, likely)))
    (score,) = answer.scores
    assert (score.logprob, score.num_likelier) == (-0.5, 0)
    assert [token.token_id for token in score.top] == [likely, likely + 1]
    (answer,) = answers(bench.submit(Scoring(1), prompt=(*PROMPT, 0)))
    assert answer.scores[-1].num_likelier == 1
    assert answer.scores[-1].top == ()


def test_a_request_without_output_ends_with_its_prompt(bench: Bench) -> None:
    bench.engine.start()
    for scoring, prompt in ((Scoring(1), PROMPT), (None, PROMPT), (Scoring(1), PROMPT[:1])):
        (answer,) = answers(bench.submit(scoring, prompt=prompt, prefix=PREFIX, max_tokens=0))
        check(answer, prompt, 1 if scoring else len(prompt), "digest")
        assert answer.tokens == []
        assert answer.end is not None
        assert answer.end.reason is FinishReason.LENGTH
        assert answer.end.completion_tokens == 0
    assert bench.engine.stats().generated_tokens == 0


def test_the_sequences_of_a_request_are_scored_once(bench: Bench) -> None:
    bench.engine.start()
    first, *others = answers(bench.submit(Scoring(1), n=3), n=3)
    check(first, PROMPT, 1)
    assert [answer.scores for answer in others] == [[], []]
    assert [answer.tokens for answer in others] == [first.tokens] * 2


def test_only_kv_before_the_first_score_is_reused(bench: Bench) -> None:
    bench.engine.start()
    answers(bench.submit(None))
    for start, computed in ((1, 25), (8, 21), (9, 17), (10, 17), (24, 5)):
        seq_id = bench.count
        (answer,) = answers(bench.submit(Scoring(start), max_tokens=0))
        check(answer, PROMPT, start)
        assert bench.computed(seq_id) == computed


def test_a_scored_prompt_leaves_its_blocks_for_reuse(bench: Bench) -> None:
    bench.engine.start()
    answers(bench.submit(Scoring(1), max_tokens=0))
    (answer,) = answers(bench.submit(None))
    assert bench.computed(1) < len(PROMPT)
    assert answer.tokens == fake_generate(None, PROMPT, 3)


def test_a_preempted_sequence_sends_no_score_twice(bench: Bench) -> None:
    scheduler = bench.engine.core.scheduler
    schedule, calls = scheduler.schedule, iter(range(1000))

    def schedule_after_preempting(*, now: float = 0.0) -> Step:
        if next(calls) in {2, 4, 5, 8} and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
        return schedule(now=now)

    scheduler.schedule = schedule_after_preempting  # type: ignore[method-assign]
    waits = [bench.submit(Scoring(1), prompt=PROMPT * k, prefix=PREFIX) for k in (1, 2)]
    bench.engine.start()
    for events, k in zip(waits, (1, 2), strict=True):
        (answer,) = answers(events)
        check(answer, PROMPT * k, 1, "digest")
        assert answer.tokens == fake_generate("digest", PROMPT * k, 3)
    assert scheduler.num_preemptions >= 3


def test_scores_of_a_failed_step_are_computed_again(bench: Bench) -> None:
    run, calls = bench.runner.run, iter(range(1000))

    def fail_sometimes(step: Step) -> StepOutput:
        if next(calls) in {1, 3}:
            raise OutOfMemory("no memory")
        return run(step)

    bench.runner.run = fail_sometimes  # type: ignore[method-assign]
    waits = [bench.submit(Scoring(1), prompt=PROMPT * 2, max_tokens=m) for m in (0, 2)]
    bench.engine.start()
    for events in waits:
        (answer,) = answers(events)
        check(answer, PROMPT * 2, 1)


@pytest.mark.parametrize("start", [1, 23], ids=["first chunk", "last chunk"])
def test_scores_that_are_not_finite_end_their_request_alone(bench: Bench, start: int) -> None:
    run = bench.runner.run

    def lose_scores(step: Step) -> StepOutput:
        output = run(step)
        lost: dict[int, Sequence[PromptScore] | None] = {
            seq_id: None if seq_id == 0 else scores for seq_id, scores in output.scored.items()
        }
        return replace(output, scored=lost)

    bench.runner.run = lose_scores  # type: ignore[method-assign]
    waits = [bench.submit(Scoring(start), kv_reuse=False) for _ in range(2)]
    bench.engine.start()
    (failed,), (answer,) = map(answers, waits)
    assert failed.end is not None
    assert failed.end.error == "the model produced non-finite logits for this request"
    assert failed.scores == []
    assert failed.tokens == []
    check(answer, PROMPT, start)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_scores_no_more_than_its_share(depth: int) -> None:
    bench = Bench(depth, max_scored=4)
    waits = [bench.submit(Scoring(1)) for _ in range(3)]
    bench.engine.start()
    for events in waits:
        check(answers(events)[0], PROMPT, 1)
    bench.engine.stop()
    for step in bench.runner.steps:
        scored = [len(chunk.targets.tokens) for chunk in step.chunks if chunk.targets]
        # One more for each sequence that begins or goes on where none may be scored.
        assert sum(scored) <= 4 + len(scored)
