"""The pure scheduler as a state machine: invariants hold after every rule, whatever happens."""

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from server.engine.config import SchedulerConfig
from server.engine.request import (
    AdmittedRequest,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, State
from server.engine.step import StepOutput
from server.testing import FakeRunner, FakeStaged, fake_generate

PREFIXES = [
    PrefixHandle(PrefixKey(tenant, f"{tenant}-{length}"), length)
    for tenant, length in itertools.product("ab", (1, 3, 4, 8, 13))
]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, fetches, failures and aborts in any order, on pools down to the smallest."""

    sequences = Bundle("sequences")

    @initialize(
        blocks=st.integers(5, 20),
        chunk=st.sampled_from([1, 3, 16]),
        running=st.integers(1, 5),
        cap=st.sampled_from([None, 13, 16]),
    )
    def start(self, blocks: int, chunk: int, running: int, cap: int | None) -> None:
        self.cap = cap
        self.config = SchedulerConfig(
            num_blocks=blocks,
            block_size=4,
            max_tokens_per_step=12,
            max_prefill_chunk=chunk,
            max_running=running,
            max_staged=2,
        )
        self.scheduler = Scheduler(self.config)
        self.runner = FakeRunner(block_size=4)
        self.ids = itertools.count()
        self.fetching: list[PrefixKey] = []
        self.alive: dict[int, Sequence] = {}

    @rule(
        target=sequences,
        tenant=st.sampled_from("ab"),
        prefix=st.none() | st.integers(0, 4),
        prompt=st.lists(st.integers(0, 255), min_size=1, max_size=14),
        max_tokens=st.integers(1, 16),
        to_the_brim=st.booleans(),
    )
    def add(
        self,
        tenant: str,
        prefix: int | None,
        prompt: list[int],
        max_tokens: int,
        to_the_brim: bool,
    ) -> object:
        handle = None if prefix is None else PREFIXES["ab".index(tenant) * 5 + prefix]
        fits = self.config.max_tokens_for(handle.num_tokens if handle else 0)
        if to_the_brim and len(prompt) < fits:
            max_tokens = fits - len(prompt)
        if len(prompt) + max_tokens > fits:
            return multiple()  # admission refuses it
        seq_id = next(self.ids)
        request = AdmittedRequest(
            request_id=str(seq_id),
            tenant=tenant,
            prompt=tuple(prompt),
            prefix=handle,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(max_tokens=max_tokens),
            max_resident_tokens=self.cap if tenant == "a" else None,
        )
        sequence = Sequence(seq_id, request, 0, 0, list(prompt))
        self.alive[seq_id] = sequence
        self.scheduler.add(sequence)
        return sequence

    @rule()
    def step(self) -> None:
        before = {s.seq_id: s.num_remaining for s in self.scheduler.running}
        preemptions = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        self.check_step(step)
        resident = self.scheduler.memory.residency.tokens_of("a")
        assert self.cap is None or resident <= self.cap, "a tenant is over its cap"
        decodes = {i for i, remaining in before.items() if remaining == 1}
        served = {c.seq_id for c in step.chunks}
        missed = decodes - served
        assert len(missed) <= self.scheduler.num_preemptions - preemptions, "a decode row stalled"
        self.fetching += step.fetches
        output = self.runner.run(step) if step.has_work else StepOutput({})
        for progress in self.scheduler.update(step, output):
            if progress.finished:
                self.check_ended(progress.sequence)

    def check_step(self, step: object) -> None:
        assert step.num_tokens <= self.config.max_tokens_per_step
        assert len(step.chunks) <= self.config.max_running
        assert len(set(step.fresh)) == len(step.fresh), "a block given out twice in one step"
        writers: dict[int, object] = {}
        for chunk in step.chunks:
            first = chunk.start // 4
            last = (chunk.start + len(chunk.tokens) - 1) // 4
            for block in chunk.block_table[first : last + 1]:
                assert writers.setdefault(block, chunk.seq_id) == chunk.seq_id, "two writers"
                assert self.scheduler.memory.pool.references(block) == 1, (
                    "a shared block is written"
                )

    def check_ended(self, sequence: Sequence) -> None:
        del self.alive[sequence.seq_id]
        assert sequence.reason is FinishReason.LENGTH
        digest = sequence.prefix.key.digest if sequence.prefix else None
        expected = fake_generate(digest, sequence.request.prompt, sequence.num_output)
        assert sequence.tokens[sequence.num_prompt :] == expected

    @rule(which=st.integers(0, 5))
    def fetch_ends_well(self, which: int) -> None:
        if not self.fetching:
            return
        key = self.fetching.pop(which % len(self.fetching))
        length = next(p.num_tokens for p in PREFIXES if p.key == key)
        assert self.scheduler.prefix_staged(key, FakeStaged(length)) == []

    @rule(which=st.integers(0, 5), wrong_length=st.booleans())
    def fetch_fails(self, which: int, wrong_length: bool) -> None:
        if not self.fetching:
            return
        key = self.fetching.pop(which % len(self.fetching))
        if wrong_length:
            failed = self.scheduler.prefix_staged(key, FakeStaged(99))
        else:
            failed = self.scheduler.prefix_failed(key, "gone")
        for sequence in failed:
            assert sequence.prefix is not None
            assert sequence.prefix.key == key
            assert sequence.reason is FinishReason.ERROR
            del self.alive[sequence.seq_id]

    @rule(sequence=consumes(sequences))
    def abort(self, sequence: Sequence) -> None:
        if not sequence.finished:
            self.scheduler.end(sequence, FinishReason.ABORT)
            del self.alive[sequence.seq_id]

    @rule()
    def a_step_fails(self) -> None:
        step = self.scheduler.schedule()
        self.fetching += step.fetches
        carried = {c.seq_id for c in step.chunks}
        compiled = {c.key for c in step.compiles}
        for sequence in self.scheduler.step_failed(step, "boom"):
            waits = sequence.prefix is not None and sequence.prefix.key in compiled
            assert sequence.seq_id in carried or waits
            del self.alive[sequence.seq_id]

    @rule()
    def everybody_gets_served(self) -> None:
        """With every fetch answered, every living sequence ends: no deadlock, no livelock."""
        for _ in range(3000):
            if self.scheduler.idle:
                break
            self.step()
            while self.fetching:
                self.fetch_ends_well(0)
        assert self.scheduler.idle, f"stuck: {self.scheduler!r}"
        assert not self.alive

    @invariant()
    def blocks_conserve(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert len(self.scheduler.running) <= self.config.max_running
            assert {s.seq_id for s in self.scheduler.running} | {
                s.seq_id for s in self.scheduler.waiting
            } == set(self.alive)
            for sequence in self.alive.values():
                assert sequence.state is not State.FINISHED

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.everybody_gets_served()
            self.scheduler.check_integrity()
            pool = self.scheduler.memory.pool
            held = sum(len(entry.blocks) for entry in self.scheduler.memory.residency)
            assert pool.num_free + held == pool.num_usable, "idle, and blocks are missing"


TestScheduler = pytest.mark.filterwarnings("default")(SchedulerMachine.TestCase)
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
