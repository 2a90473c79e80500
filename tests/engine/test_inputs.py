"""Embeddings in a prompt: what the engine does with positions that have no token."""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.inputs import PLACEHOLDER, InputPart, InputRun, parts_within
from prefixd.server.engine.lookup import Lookup
from prefixd.server.engine.request import (
    AdmittedRequest,
    Composition,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence as EngineSequence
from prefixd.server.engine.sequence import sequences_of
from prefixd.server.testing import (
    ByteDetokenizer,
    FakeEmbeddings,
    FakeRunner,
    FakeStaged,
    fake_generate,
)
from tests.engine.test_engine import Bench, answer

BLOCK = 4
ROWS = FakeEmbeddings(b"rows", 3)
PROMPT = (104, 101, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, 108, 111)
INPUTS = (InputRun(2, ROWS),)
READ = [104, 101, *ROWS.rows(), 108, 111]


def request(**changes: object) -> AdmittedRequest:
    made = AdmittedRequest(
        request_id="r",
        tenant="t",
        prompt=PROMPT,
        prefix=None,
        sampling=SamplingParams(temperature=0),
        stop=StopParams(max_tokens=6),
        inputs=INPUTS,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def scheduler(**config: object) -> Scheduler:
    fields = {"num_blocks": 32, "block_size": BLOCK, "max_tokens_per_step": 16, "max_running": 4}
    return Scheduler(SchedulerConfig(**{**fields, **config}))  # type: ignore[arg-type]


def run(scheduled: Scheduler, runner: FakeRunner) -> None:
    while not scheduled.idle:
        step = scheduled.schedule()
        if step.has_work:
            scheduled.update(step, runner.run(step))


def add(scheduled: Scheduler, made: AdmittedRequest, first_id: int = 0) -> list[EngineSequence]:
    sequences = sequences_of(made, first_id=first_id, seed=0)
    for sequence in sequences:
        scheduled.add(sequence)
    return sequences


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_rows_run_in_the_chunks_that_they_fall_into(chunk: int) -> None:
    scheduled, runner = scheduler(max_prefill_chunk=chunk), FakeRunner(block_size=BLOCK)
    sequences = add(scheduled, request(n=2))
    run(scheduled, runner)
    for sequence in sequences:
        assert sequence.tokens[7:] == fake_generate(None, READ, 6)
    parts = [part for step in runner.steps for c in step.chunks for part in c.inputs]
    assert sum(part.stop - part.start for part in parts) == 2 * 3


def test_parts_count_from_the_start_of_the_chunk() -> None:
    assert list(parts_within(INPUTS, 3, 9)) == [InputPart(0, ROWS, 1, 3)]
    assert list(parts_within(INPUTS, 0, 3)) == [InputPart(2, ROWS, 0, 1)]
    assert list(parts_within(INPUTS, 5, 9)) == []


def test_runs_cover_exactly_the_placeholders() -> None:
    for runs in (INPUTS[:0], (InputRun(1, ROWS),)):
        with pytest.raises(AssertionError):
            sequences_of(request(inputs=(*runs, InputRun(3, ROWS))), first_id=0, seed=0)


def test_a_preempted_sequence_reads_its_rows_again() -> None:
    scheduled, runner = scheduler(), FakeRunner(block_size=BLOCK)
    (sequence,) = add(scheduled, request(kv_reuse=False))
    scheduled.update(step := scheduled.schedule(), runner.run(step))
    scheduled.preempt(sequence)
    run(scheduled, runner)
    assert sequence.tokens[7:] == fake_generate(None, READ, 6)


def test_kv_is_reused_for_equal_rows_alone() -> None:
    scheduled, runner = scheduler(), FakeRunner(block_size=BLOCK)
    other = FakeEmbeddings(b"other", 3)
    add(scheduled, request())
    run(scheduled, runner)
    (same,) = add(scheduled, request(), 1)
    (different,) = add(scheduled, request(inputs=(InputRun(2, other),)), 2)
    (elsewhere,) = add(
        scheduled,
        request(prompt=(104, *[PLACEHOLDER] * 3, *PROMPT[5:]), inputs=(InputRun(1, ROWS),)),
        3,
    )
    run(scheduled, runner)
    assert (same.num_cached, different.num_cached, elsewhere.num_cached) == (4, 0, 0)
    assert different.tokens[7:] == fake_generate(None, [104, 101, *other.rows(), 108, 111], 6)


def test_parts_of_a_prefix_are_residents_of_their_own() -> None:
    whole, part = PrefixKey("t", "d"), PrefixKey("t", "d", ((2, 4), (6, 7)))
    scheduled, runner = scheduler(), FakeRunner(block_size=BLOCK)
    under = [
        *add(scheduled, request(prefix=PrefixHandle(whole, 8))),
        *add(scheduled, request(prefix=PrefixHandle(part, 3)), 1),
    ]
    for _ in range(40):
        step = scheduled.schedule()
        for key in step.fetches:
            scheduled.prefix_staged(key, FakeStaged(8 if key == whole else 3))
        scheduled.update(step, runner.run(step))
    assert [s.tokens[7:] for s in under] == [
        fake_generate("d", READ, 6),
        fake_generate("d[2:4,6:7]", READ, 6),
    ]
    assert under[1].num_cached == 0, "KV of the whole prompt is reused under a part of it"
    scheduled.prefix_loader.retire([whole])
    scheduled.schedule()
    assert len(scheduled.memory.residency) == 0, "a part of a deleted version stays"


def test_what_was_uploaded_again_is_fetched_again_in_parts_too() -> None:
    loader = scheduler().prefix_loader
    for key in (PrefixKey("t", "d", ((0, 2),)), PrefixKey("u", "d")):
        loader.failed(key, "gone", code=None, now=0.0)
    loader.forget_failure(PrefixKey("t", "d"))
    assert list(loader.failures) == [PrefixKey("u", "d")]


def test_what_a_version_is_a_part_of_goes_with_it() -> None:
    made_of = Composition("blend", ("d", "e"), (0.5, 0.5))
    blend, other = PrefixKey("t", "mix", composition=made_of), PrefixKey("t", "e")
    scheduled, runner = scheduler(), FakeRunner(block_size=BLOCK)
    for number, key in enumerate((blend, other)):
        add(scheduled, request(prefix=PrefixHandle(key, 8)), number)
    for _ in range(40):
        step = scheduled.schedule()
        for key in step.fetches:
            scheduled.prefix_staged(key, FakeStaged(8))
        scheduled.update(step, runner.run(step))
    scheduled.prefix_loader.retire([PrefixKey("u", "d")])
    scheduled.schedule()
    assert len(scheduled.memory.residency) == 2, "another tenant's version has the same digest"
    scheduled.prefix_loader.retire([PrefixKey("t", "d")])
    scheduled.schedule()
    assert [entry.key for entry in scheduled.memory.residency] == [other]
    loader = scheduled.prefix_loader
    loader.failed(blend, "gone", code=None, now=0.0)
    loader.forget_failure(PrefixKey("t", "e"))
    assert not loader.failures


def test_placeholders_are_not_proposed() -> None:
    lookup = Lookup()
    given = [PLACEHOLDER] * 2
    assert lookup.find([1, 2, 3, *given, 4, 1, 2, 3]) == 0.0, "what followed is no token"
    assert Lookup().find([1, 2, 3, 5, *given, 4, 1, 2, 3]) > 0.0
    lookup = Lookup()
    tokens = [1, 2, 3, 5, *given, 4, 1, 2, 3]
    lookup.find(tokens)
    assert lookup.propose(tokens, 4) == [5]


@pytest.fixture
def bench() -> Iterator[Bench]:
    prompts: list[Sequence[int]] = []

    def detokenizer(prompt: Sequence[int]) -> ByteDetokenizer:
        prompts.append(prompt)
        return ByteDetokenizer(prompt)

    bench = Bench(detokenizer=detokenizer)
    bench.prompts = prompts  # type: ignore[attr-defined]
    bench.engine.start()
    yield bench
    bench.engine.stop()


def test_rows_have_no_text_and_are_not_counted_as_cached_tokens(bench: Bench) -> None:
    text = bytes(fake_generate(None, READ, 6)).decode()
    events: queue.Queue[object] = queue.Queue()
    for request_id, num_cached in (("first", 0), ("again", 2)):
        bench.engine.submit(request(request_id=request_id), events.put)
        answered, end = answer(events)  # type: ignore[arg-type]
        assert (answered, end.cached_tokens) == (text, num_cached), "two of the block are rows"
    assert set(map(tuple, bench.prompts)) == {(104, 101, 108, 111)}  # type: ignore[attr-defined]
