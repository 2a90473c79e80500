"""The pure scheduler as a state machine: invariants hold after every rule."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items

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

from prefixd.server import testing
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Stage
from prefixd.server.engine.inputs import PLACEHOLDER, InputRun
from prefixd.server.engine.request import (
    AdmittedRequest,
    Composition,
    FinishReason,
    Member,
    PrefixHandle,
    PrefixKey,
    PromptScore,
    SamplingParams,
    Scoring,
    StopParams,
)
from prefixd.server.engine.row_costs import RowCosts
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import End, Sequence, State, sequences_of
from prefixd.server.engine.step import Chunk, Sampled, Step, StepOutput
from prefixd.server.testing import (
    FakeEmbeddings,
    FakeRunner,
    FakeStaged,
    fake_ensemble,
    fake_generate,
)
from tests.engine.constraints import Rule, alternating, masks

BLOCK = 4
TENANTS = "abc"
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0}
LENGTHS = (1, 3, 4, 8, 13)
GATED = 6
"""The length of the gated prefix of each tenant."""


def key_with(tenant: str, length: int) -> PrefixKey:
    """The key of a tenant's prefix; one of them is a part of another, and one is made of two."""
    match length:
        case 3:
            return PrefixKey(tenant, f"{tenant}-8", ((2, 4), (7, 8)))
        case 4:
            made_of = Composition("stack", (f"{tenant}-1", f"{tenant}-8"))
            return PrefixKey(tenant, f"{tenant}-4", composition=made_of)
        case _:
            return PrefixKey(tenant, f"{tenant}-{length}")


PREFIXES = [
    PrefixHandle(key_with(tenant, length), length, gated=length == GATED)
    for tenant, length in itertools.product(TENANTS, (*LENGTHS, GATED))
]

EACH = len(PREFIXES) // len(TENANTS)
Ended = list[Sequence]
PROMPTS = [[1] * 14, [1] * 6 + [2] * 8]
"""Prompts are beginnings of these, so that requests share blocks."""


STOPS = (frozenset[int](), frozenset(range(ord("a"), ord("h"))), frozenset({1}))


def place(prompt: list[int], first: int, rows: int) -> tuple[InputRun, ...]:
    """Replace tokens of ``prompt`` by up to ``rows`` given embeddings from ``first`` on."""
    rows = min(rows, len(prompt) - first)
    if rows < 1:
        return ()
    prompt[first : first + rows] = [PLACEHOLDER] * rows
    return (InputRun(first, FakeEmbeddings(b"%d rows" % rows, rows)),)


def as_read(request: AdmittedRequest) -> list[int]:
    """The input of the encoder, and the prompt as FakeRunner reads it."""
    prompt = list(request.prompt)
    for run in request.inputs:
        assert isinstance(run.payload, FakeEmbeddings)
        prompt[run.place : run.stop] = run.payload.rows()
    return [*request.source, *prompt]


def handle_of(tenant: str, prefix: int | None) -> PrefixHandle | None:
    return None if prefix is None else PREFIXES[TENANTS.index(tenant) * EACH + prefix]


def rows_of(members: Items[Member]) -> list[tuple[PrefixHandle | None, Items[int]]]:
    return [(member.prefix, member.prompt) for member in members]


def keys_of(sequence: Sequence) -> set[PrefixKey]:
    """The prefixes of all rows."""
    return {row.prefix.key for row in sequence.rows if row.prefix is not None}


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, fetches, failures, aborts, pins, warms, retirements and the passing of time in any
    order, on pools down to the smallest, with a step in flight while the next is planned or not."""

    sequences = Bundle("sequences")

    @initialize(
        blocks=st.integers(5, 24),
        chunk=st.sampled_from([1, 3, 16]),
        scored=st.sampled_from([0, 4]),
        running=st.integers(1, 5),
        cap=st.sampled_from([None, 13, 16]),
        budget=st.sampled_from([None, 13, 17]),
        host=st.sampled_from([0, 13, 40]),
        queue=st.sampled_from([None, 60]),
        looked_at=st.sampled_from([2, 256]),
        speculate=st.booleans(),
        depth=st.integers(0, 1),
        state_blocks=st.sampled_from([0, 3]),
    )
    def start(
        self,
        *,
        blocks: int,
        chunk: int,
        scored: int,
        running: int,
        cap: int | None,
        budget: int | None,
        host: int,
        queue: int | None,
        looked_at: int,
        speculate: bool,
        depth: int,
        state_blocks: int,
    ) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("prefixd.server.engine.step_builder.LOOKAHEAD", looked_at)
        self.patch.setattr("prefixd.server.engine.step_budget.LEAST", 1)
        if speculate:  # a text of few different tokens repeats itself
            next_token = testing.fake_next_token
            self.patch.setattr(testing, "fake_next_token", lambda *so_far: next_token(*so_far) % 2)
            self.patch.setattr(RowCosts, "needs_plain", lambda *_: False)
            if depth:  # drafts are tried where they may pay, which is rare one behind
                self.patch.setattr(RowCosts, "slowdown", lambda *_: 1.0)
        self.cap = cap
        self.config = SchedulerConfig(
            num_blocks=blocks + 2 * state_blocks,
            block_size=BLOCK,
            max_tokens_per_step=12,
            max_prefill_chunk=chunk,
            max_scored=scored,
            max_token_gap_s=0.1,
            max_running=running,
            max_staged=2,
            max_resident_tokens=budget,
            host_tokens=host,
            max_prefix_wait_s=0.3,
            failed_prefix_memory_s=2.0,
            max_waiting_tokens=queue,
            max_queue_wait_s=None if queue is None else 4.0,
            speculate=speculate,
            state_blocks=state_blocks,
        )
        self.watch_preemptions()
        self.scheduler = Scheduler(self.config, namespace="model")
        self.runner = FakeRunner(block_size=BLOCK, depth=depth, state_blocks=state_blocks)
        self.now = 0.0
        self.ids = itertools.count()
        self.fetching: list[PrefixKey] = []
        self.failed_at: dict[PrefixKey, float] = {}
        self.alive: dict[int, Sequence] = {}
        self.scores: dict[int, list[PromptScore]] = {}
        self.writers: dict[int, tuple[str, str | None]] = {}
        self.service: defaultdict[str, float] = defaultdict(float)
        self.backlogged: dict[tuple[str, str], float] = {}
        charge = self.scheduler.waiting.charge

        def charge_and_count(tenant: str, tokens: int) -> None:
            self.service[tenant] += tokens / WEIGHTS[tenant]
            charge(tenant, tokens)

        self.scheduler.waiting.charge = charge_and_count  # type: ignore[method-assign]
        self.watch_share()

    def watch_share(self) -> None:
        """Note what the background class is allowed in a step; None: all."""
        self.allowed: int | None = None
        share = self.scheduler.background_builder.share
        tokens = share.tokens

        def allow(step: Step) -> int:
            self.allowed = tokens(step)
            return self.allowed

        share.tokens = allow  # type: ignore[method-assign]

    def watch_preemptions(self) -> None:
        """Note what is preempted, and check that the background class is first."""
        self.planning = False
        self.preempted: list[int] = []
        preempt = Scheduler.preempt

        def preempt_and_note(scheduler: Scheduler, sequence: Sequence) -> None:
            if self.planning and not sequence.background and not sequence.num_yields:
                assert not scheduler.background.running, "the background class is first"
            self.preempted.append(sequence.leader.seq_id)
            preempt(scheduler, sequence)

        self.patch.setattr(Scheduler, "preempt", preempt_and_note)

    # -- requests ----

    @rule(
        target=sequences,
        tenant=st.sampled_from(TENANTS),
        prefix=st.none() | st.integers(0, EACH - 1),
        prompt=st.builds(lambda text, n: text[:n], st.sampled_from(PROMPTS), st.integers(1, 14)),
        max_tokens=st.integers(0, 16),
        up_to_the_limit=st.booleans(),
        priority=st.integers(-1, 1),
        timeout=st.sampled_from([None, None, 3.0]),
        kv_reuse=st.booleans(),
        stop=st.sampled_from(STOPS),
        min_tokens=st.integers(0, 5),
        constraint=st.sampled_from([None, None, alternating()]),
        side_blocks=st.sampled_from([0, 0, 2]),
        first_given=st.integers(0, 13),
        num_given=st.sampled_from([0, 0, 2, 5, 13]),
        source=st.sampled_from([(), (3,), tuple(range(5)), tuple(range(9))]),
        scoring=st.sampled_from([None, None, Scoring(1), Scoring(6, top=1)]),
        background=st.sampled_from([False, False, True]),
        members=st.lists(
            st.tuples(st.none() | st.integers(0, EACH - 1), st.integers(1, 14)), max_size=3
        ),
    )
    def add(
        self,
        *,
        tenant: str,
        prefix: int | None,
        prompt: list[int],
        max_tokens: int,
        up_to_the_limit: bool,
        priority: int,
        timeout: float | None,
        kv_reuse: bool,
        stop: frozenset[int],
        min_tokens: int,
        constraint: Rule | None,
        side_blocks: int,
        first_given: int,
        num_given: int,
        source: tuple[int, ...],
        scoring: Scoring | None,
        background: bool,
        members: list[tuple[int | None, int]],
    ) -> object:
        handle = handle_of(tenant, prefix)
        if self.config.state_blocks:
            source = ()  # no encoder-decoder has states
        if source:
            num_soft = handle.num_tokens if handle is not None and handle.gated else 0
            side_blocks = self.config.blocks_needed(num_soft + len(source))
        fits = self.config.max_tokens_for(
            handle.num_tokens if handle else 0,
            num_side_blocks=side_blocks,
            gated=handle is not None and handle.gated,
        )
        if up_to_the_limit and len(prompt) < fits:
            max_tokens = fits - len(prompt)
        if len(prompt) + max(1, max_tokens) > fits:
            return multiple()  # admission would reject it
        seq_id = next(self.ids)
        prompt = list(prompt)
        inputs = place(prompt, first_given, num_given)
        others = [] if source or not max_tokens or background else members
        rows = tuple(Member(tuple(PROMPTS[1][:n]), handle_of(tenant, p)) for p, n in others)
        if rows and not self.fits_together(
            tenant, [(handle, prompt), *rows_of(rows)], max_tokens, side_blocks
        ):
            return multiple()
        request = AdmittedRequest(
            request_id=str(seq_id),
            tenant=tenant,
            prompt=tuple(prompt),
            prefix=handle,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(max_tokens=max_tokens, token_ids=stop, min_tokens=min_tokens),
            max_resident_tokens=self.cap if tenant == "a" else None,
            weight=WEIGHTS[tenant],
            priority=priority,
            timeout_s=timeout,
            kv_reuse=kv_reuse,
            constraint=constraint,
            num_side_blocks=side_blocks,
            inputs=inputs,
            source=source,
            scoring=None if source or rows else scoring,
            background=background,
            members=rows,
        )
        self.scores[seq_id] = []
        (sequence,) = sequences_of(request, first_id=seq_id, seed=0)
        for _ in rows:
            next(self.ids)
        self.alive[seq_id] = sequence
        for ended in self.scheduler.add(sequence, now=self.now):
            del self.alive[ended.seq_id]
            if ended.reason is FinishReason.SHED:
                assert ended.started is None, "what has started is not shed"
                assert not background, "a background request sheds others"
                assert not ended.background, "a background request is shed"
            else:
                assert ended is sequence
                failed = [self.failed_at.get(key, -9.0) for key in keys_of(sequence)]
                assert self.now < max(failed) + 2.0, "an old failure is remembered"
        bound = self.config.max_waiting_tokens
        waiting = [s for s in self.scheduler.waiting if s.started is None]
        if bound is not None and len(waiting) > 1:
            assert self.scheduler.waiting.num_tokens <= bound or any(
                s.started is not None for s in self.scheduler.waiting
            )
        return sequence if not sequence.finished else multiple()

    def fits_together(
        self,
        tenant: str,
        rows: Items[tuple[PrefixHandle | None, Items[int]]],
        max_tokens: int,
        side_blocks: int,
    ) -> bool:
        """As admission checks it for an ensemble."""
        lengths = [(handle, len(prompt) + max_tokens) for handle, prompt in rows]
        resident = sum({p: p.num_tokens for p, _ in rows if p is not None}.values())
        caps = [self.config.max_resident_tokens, self.cap if tenant == "a" else None]
        return (
            len(rows) <= self.config.max_running
            and self.config.blocks_together(lengths, num_side_blocks=side_blocks)
            <= self.config.num_usable_blocks
            and all(cap is None or resident <= cap for cap in caps)
        )

    @rule(sequence=consumes(sequences))
    def abort(self, sequence: Sequence) -> None:
        if not sequence.finished:
            self.scheduler.end(sequence, End(FinishReason.ABORT))
            del self.alive[sequence.seq_id]

    @rule(seconds=st.sampled_from([0.3, 1.1, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for sequence in self.scheduler.expire(now=self.now):
            timeout_s = sequence.request.timeout_s
            if sequence.reason is FinishReason.TIMEOUT:
                assert timeout_s is not None
                assert self.now >= sequence.arrived + timeout_s
            else:
                assert sequence.reason is FinishReason.SHED
                assert sequence.started is None
                assert not sequence.background, "a background request waits as long as it takes"
            del self.alive[sequence.seq_id]
        for sequence in self.alive.values():
            timeout_s = sequence.request.timeout_s
            assert timeout_s is None or self.now < sequence.arrived + timeout_s, "past its deadline"

    # -- steps ----

    @rule(speed=st.sampled_from([0.001, 0.02, 0.2]))
    def step(self, speed: float) -> None:
        self.time_passes(0.1)
        before = [
            s for s in self.scheduler.running if all(row.num_remaining == 1 for row in s.rows)
        ]
        decodes = {s.seq_id for s in before if not self.may_wait(s)}
        proving = self.scheduler.recovery.proving
        preempted = len(self.preempted)
        waited = self.ready_tenants()
        unstarted = {s.seq_id for s in self.scheduler.background.waiting}
        self.was_running = bool(self.scheduler.running)
        step = self.plan()
        self.check_budgets()
        self.check_fairness(waited & self.ready_tenants())
        planned = {c.seq_id for c in step.chunks}
        missed = decodes - planned
        if proving and self.scheduler.recovery.proving:
            assert step.num_parts <= 1, "a sequence of a failed step must run alone"
        elif not proving:
            leaders = {s.leader.seq_id for s in before if s.seq_id in missed}
            assert leaders <= set(self.preempted[preempted:]), "a decode stalled"
            self.check_step_budget(step, planned & {s.seq_id for s in before})
            self.check_background(step, unstarted)
        self.scheduler.observe(step, speed * step.num_tokens)
        self.end_all(self.run(step))

    def check_background(self, step: Step, unstarted: set[int]) -> None:
        """The foreground is first in the step and at the start, and is prolonged by little."""
        background = self.scheduler.background
        ids = {s.seq_id for s in self.scheduler.sequences() if s.background}
        num_foreground = len(step.chunks) if step.num_foreground is None else step.num_foreground
        assert [chunk.seq_id in ids for chunk in step.chunks] == [
            place >= num_foreground for place in range(len(step.chunks))
        ]
        if self.allowed is not None:
            num_encoded = sum(chunk.num_encoded for chunk in step.chunks[num_foreground:])
            assert step.background_tokens - num_encoded <= self.allowed, "more than its share"
        elif step.background_tokens:
            assert not num_foreground
            assert not self.was_running, "the foreground waits for a step without it"
        if unstarted & {sequence.seq_id for sequence in background.running}:
            waiting = self.scheduler.waiting
            ready = [s for s in waiting if self.scheduler.memory.is_ready(s)]
            assert not ready, "the foreground waits, and the background class starts"

    def may_wait(self, sequence: Sequence) -> bool:
        """Whether the sequence may miss a step until its pending token has come."""
        speculates = self.config.speculate and sequence.speculates
        return sequence.num_pending > 0 and (sequence.is_complete or speculates)

    def plan(self) -> Step:
        self.allowed, self.planning = None, True
        step = self.scheduler.schedule(now=self.now)
        self.planning = False
        self.check_step(step)
        self.fetching += step.fetches
        return step

    def run(self, step: Step, *, spoil: Callable[[StepOutput], object] | None = None) -> Ended:
        """Submit a step, and collect what the engine would collect then. ``spoil`` changes the
        output of the first step that is collected."""
        if step.has_work:
            self.runner.submit(step)
        ended = []
        in_flight = self.scheduler.in_flight
        while in_flight and in_flight[0] is not step:
            ended += self.collect(spoil)
            spoil = None
        if step.masked:
            self.runner.complete(lambda: masks(self.scheduler, step))
        if in_flight and (not self.runner.depth or self.scheduler.recovery.proving):
            ended += self.collect(spoil)
        return ended

    def collect(self, spoil: Callable[[StepOutput], object] | None = None) -> Ended:
        output = self.runner.collect()
        alive = {i: sampled for i, sampled in output.sampled.items() if i in self.alive}
        output = StepOutput(alive, output.saved, scored=output.scored)
        for chunk in self.scheduler.in_flight[0].chunks:
            scores = output.scored.get(chunk.seq_id)
            if scores is not None and chunk.seq_id in self.alive:
                self.take_scores(
                    self.alive[chunk.seq_id], *self.alive[chunk.seq_id].untaken(chunk, scores)
                )
        if spoil is not None:
            spoil(output)
        ended = self.scheduler.update(self.scheduler.in_flight[0], output)
        self.scheduler.check_integrity()
        return ended

    def take_scores(self, sequence: Sequence, place: int, scores: Items[PromptScore]) -> None:
        """As a caller gets them: each once, in order."""
        taken, scoring = self.scores[sequence.seq_id], sequence.request.scoring
        assert scoring is not None
        if scores:
            assert place == scoring.start + len(taken)
            taken += scores

    @rule(which=st.integers(0, 4))
    def preempt(self, which: int) -> None:
        """As for another tenant, whenever a step may be in flight."""
        running = self.scheduler.running
        if running and not self.scheduler.recovery.proving:
            self.scheduler.preempt(running[which % len(running)])

    def check_step(self, step: Step) -> None:
        encoded = [chunk.num_encoded for chunk in step.chunks if chunk.num_encoded]
        limit = self.config.max_tokens_per_step
        assert step.num_tokens - step.num_encoded <= limit
        assert sum(encoded[1:]) < limit, "one encoder alone may exceed the budget"
        assert len(step.chunks) <= self.config.max_running
        compiled = sum(part.stop - part.start for part in step.compiles)
        assert compiled <= self.config.max_prefill_chunk, "a row waits for more than one chunk"
        assert len(set(step.fresh)) == len(step.fresh), "a block allocated twice in one step"
        assert len(set(step.fetches)) == len(step.fetches)
        assert not set(step.fetches) & set(self.fetching), "fetched twice concurrently"
        for copy in step.copies:
            self.writers.pop(copy.target, None)
        for block in step.fresh:
            self.writers.pop(block, None)
        writers: dict[int, object] = {}
        self.check_ensembles(step)
        owners = {row.seq_id: row for each in self.alive.values() for row in each.rows}
        for chunk in step.chunks:
            owner = owners[chunk.seq_id]
            owner_key = owner.tenant, owner.prefix.key.content if owner.prefix else None
            self.check_gated(chunk, owner)
            first = chunk.start // BLOCK
            last = (chunk.start + chunk.length - 1) // BLOCK
            for block in chunk.block_table[owner.num_prefix_tokens // BLOCK : first]:
                assert self.writers[block] == owner_key, "KV of another tenant or prefix is reused"
            for block in chunk.block_table[first : last + 1]:
                assert writers.setdefault(block, chunk.seq_id) == chunk.seq_id, "two writers"
                assert self.scheduler.memory.pool.references(block) == 1, (
                    "a shared block is written"
                )
                self.writers[block] = owner_key
            for block in chunk.side_blocks:
                assert writers.setdefault(block, chunk.seq_id) == chunk.seq_id, "two writers"
                assert self.writers.get(block) is None, "a side block holds reusable KV"
        for part in step.compiles:
            for block in part.side_blocks:
                assert writers.setdefault(block, part.key) == part.key, "two writers"

    def check_ensembles(self, step: Step) -> None:
        """All rows of an ensemble are sampled in one step, one after another, or none."""
        sampled = [c for c in step.chunks if c.sampling is not None and c.ensemble is not None]
        for leader, group in itertools.groupby(sampled, key=lambda chunk: chunk.ensemble):
            assert leader is not None
            rows = self.alive[leader].rows
            assert [chunk.seq_id for chunk in group] == [row.seq_id for row in rows]

    def check_gated(self, chunk: Chunk, owner: Sequence) -> None:
        is_gated = owner.prefix is not None and owner.prefix.gated
        assert (chunk.gated is not None) == is_gated
        if owner.prefix is not None and chunk.gated is not None:
            entry = self.scheduler.memory.residency.get(owner.prefix.key)
            assert entry is not None
            assert list(chunk.gated.block_table) == entry.blocks, "another prefix is read"
            assert not set(chunk.block_table) & set(entry.blocks), "it takes positions"
            assert chunk.num_prefix_tokens == 0

    def check_step_budget(self, step: Step, decodes: set[int]) -> None:
        limit = self.scheduler.step_budget.prompt_tokens(num_decoding=len(decodes))
        assert limit is not None
        num_prompt = step.num_tokens - step.num_encoded - len(decodes) - step.background_tokens
        assert num_prompt <= limit, "streams wait too long for prompts"

    def check_budgets(self) -> None:
        residency = self.scheduler.memory.residency
        assert self.cap is None or residency.tokens_of("a") <= self.cap, "a tenant is over its cap"
        budget = self.config.max_resident_tokens
        assert budget is None or residency.num_tokens <= budget, "prefixes are over the budget"
        assert self.scheduler.memory.host.num_tokens <= self.config.host_tokens
        coming = [entry for entry in residency if not entry.is_compiled]
        assert len(coming) <= self.config.max_staged

    def ready_tenants(self) -> set[str]:
        """Tenants with a waiting sequence that could run now if there were room."""
        if self.scheduler.recovery.proving or self.scheduler.prefix_loader.forcing is not None:
            return set()
        waiting = self.scheduler.waiting
        return {s.tenant for s in waiting if self.scheduler.memory.is_ready(s)}

    def check_fairness(self, backlogged: set[str]) -> None:
        """While two tenants are backlogged, the difference of their weighted service is at most the
        bound of Sheng et al., theorem 4.4: twice the larger of the largest input and the pool."""
        bound = 2 * max(13 + 14, self.config.num_usable_blocks * BLOCK)
        for pair in itertools.combinations(TENANTS, 2):
            if not set(pair) <= backlogged:
                self.backlogged.pop(pair, None)
                continue
            difference = self.service[pair[0]] - self.service[pair[1]]
            since = self.backlogged.setdefault(pair, difference)
            assert abs(difference - since) <= bound, "a backlogged tenant gets less than its share"

    def check_ended(self, sequence: Sequence) -> None:
        del self.alive[sequence.seq_id]
        digest = sequence.prefix.key.content if sequence.prefix else None
        stop, constraint = sequence.request.stop, sequence.request.constraint

        def banned(output: Items[int]) -> set[int]:
            return set(stop.token_ids) if len(output) < stop.min_tokens else set()

        def mask(output: Items[int]) -> bytes | None:
            return constraint.mask(output) if isinstance(constraint, Rule) else None

        prompt = as_read(sequence.request)
        expected = fake_generate(digest, prompt, stop.max_tokens, banned=banned, mask=mask)
        if sequence.ensemble:
            read = [
                (row.prefix.key.content if row.prefix else None, as_read(row.request))
                for row in sequence.rows
            ]
            expected = fake_ensemble(read, stop.max_tokens, banned=banned, mask=mask)
        ends = [i for i, token in enumerate(expected) if token in stop.token_ids]
        length = next((i + 1 for i in ends if i >= stop.min_tokens), stop.max_tokens)
        assert sequence.tokens[sequence.num_prompt :] == expected[:length]
        is_stopped = length - 1 in ends and length > stop.min_tokens
        assert sequence.reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        has_side = self.config.state_blocks or sequence.request.num_side_blocks
        if not sequence.request.kv_reuse or has_side:
            assert sequence.num_cached == 0, "KV reuse was off"
        assert sequence.num_cached < sequence.num_prompt
        self.check_scores(sequence, digest, prompt)

    def check_scores(self, sequence: Sequence, digest: str | None, prompt: list[int]) -> None:
        scoring = sequence.request.scoring
        start = sequence.num_prompt if scoring is None else scoring.start
        scored = self.scores[sequence.seq_id]
        assert len(scored) == max(0, sequence.num_prompt - start)
        for place, score in enumerate(scored, start=start):
            target = sequence.request.prompt[place]
            if target != PLACEHOLDER:
                assert score.logprob == testing.fake_score(digest, prompt[:place], target)

    # -- failures ----

    @rule(
        which=st.integers(0, 5),
        out_of_memory=st.booleans(),
        late=st.booleans(),
        writes=st.booleans(),
    )
    def a_step_fails(self, which: int, *, out_of_memory: bool, late: bool, writes: bool) -> None:
        """One part fails every step it is in, or one step is out of memory: no other part ends. A
        step fails when it is submitted, or ``late``: when it is collected. The first failure may
        come after all that the step, and those behind it, ``writes``: states have advanced then.
        """
        in_flight = self.scheduler.in_flight
        before = list(in_flight)
        step = self.plan()
        self.backlogged.clear()
        if not late and before:
            for sequence in self.collect():
                self.check_ended(sequence)
        failing = in_flight[0] if in_flight else step
        if not failing.num_parts:
            self.end_all(self.run(step))
            return
        parts = [*(c.seq_id for c in failing.chunks), *(c.key for c in failing.compiles)]
        failing_part = parts[which % len(parts)]
        if isinstance(failing_part, PrefixKey):
            self.failed_at[failing_part] = self.now
        if writes:
            for submitted in self.runner._submitted or [failing]:
                self.runner.run(submitted)
        ended = self.fail(failing, out_of_memory=out_of_memory, alone=late or not before)
        if out_of_memory:
            self.mourn(ended)
            return
        while True:
            self.mourn(ended, only=failing_part)
            if ended or not self.scheduler.recovery.proving:
                break
            step = self.plan()
            assert step.num_parts <= 1 or not self.scheduler.recovery.proving
            parts = [*(c.seq_id for c in step.chunks), *(c.key for c in step.compiles)]
            if failing_part in parts:
                ended = self.fail(step)
            else:
                self.end_all(self.run(step))

    def fail(self, step: Step, *, out_of_memory: bool = False, alone: bool = True) -> Ended:
        """``step`` fails, and what is in flight behind it is dropped."""
        self.runner._submitted.clear()
        ended = self.scheduler.step_failed(
            step, "boom", now=self.now, out_of_memory=out_of_memory, alone=alone
        )
        self.scheduler.check_integrity()
        return ended

    def end_all(self, ended: Ended) -> None:
        for sequence in ended:
            self.check_ended(sequence)

    def mourn(self, ended: list[Sequence], *, only: object = None) -> None:
        for sequence in ended:
            parts = {*keys_of(sequence), *(row.seq_id for row in sequence.rows)}
            assert only is None or only in parts, "an innocent ended"
            assert sequence.reason is FinishReason.ERROR
            del self.alive[sequence.seq_id]

    @rule(which=st.integers(0, 5))
    def a_row_goes_wrong(self, which: int) -> None:
        wrong: list[int] = []

        def spoil(output: StepOutput) -> None:
            if output.sampled:
                wrong.append(sorted(output.sampled)[which % len(output.sampled)])
                output.sampled[wrong[0]] = [Sampled(0, finite=False)]

        for sequence in self.run(self.plan(), spoil=spoil):
            if sequence.seq_id in wrong:
                assert sequence.reason is FinishReason.ERROR
                del self.alive[sequence.seq_id]
            else:
                self.check_ended(sequence)

    # -- prefixes ----

    @rule(which=st.integers(0, 5))
    def fetch_ends_well(self, which: int) -> None:
        if not self.fetching:
            return
        key = self.fetching.pop(which % len(self.fetching))
        handle = next(p for p in PREFIXES if p.key == key)
        payload = FakeStaged(handle.num_tokens, 2 if handle.gated else None)
        assert self.scheduler.prefix_staged(key, payload, now=self.now) == []

    @rule(which=st.integers(0, 5), wrong_length=st.booleans())
    def fetch_fails(self, which: int, wrong_length: bool) -> None:
        if not self.fetching:
            return
        key = self.fetching.pop(which % len(self.fetching))
        if wrong_length:
            failed = self.scheduler.prefix_staged(key, FakeStaged(99), now=self.now)
        else:
            failed = self.scheduler.prefix_failed(key, "gone", now=self.now)
        self.failed_at[key] = self.now
        for sequence in failed:
            assert key in keys_of(sequence)
            assert sequence.reason is FinishReason.ERROR
            del self.alive[sequence.seq_id]

    @rule(which=st.sets(st.integers(0, len(PREFIXES) - 1), max_size=2))
    def pin(self, which: set[int]) -> None:
        caps = None if self.cap is None else {"a": self.cap}
        # The catalog gives the length of a pin, and not its kind.
        pins = [PrefixHandle(PREFIXES[i].key, PREFIXES[i].num_tokens) for i in which]
        self.scheduler.prefix_loader.set_pins(pins, caps=caps)

    @rule(which=st.integers(0, len(PREFIXES) - 1))
    def warm(self, which: int) -> None:
        handle = PREFIXES[which]
        cap = self.cap if handle.key.tenant == "a" else None
        if cap is None or handle.num_tokens <= cap:
            self.scheduler.prefix_loader.preloads.add(handle, cap=cap, now=self.now)

    @rule(which=st.integers(0, len(PREFIXES) - 1))
    def retire(self, which: int) -> None:
        self.scheduler.prefix_loader.retire([PREFIXES[which].key])

    # -- termination ----

    @rule()
    def every_sequence_finishes(self) -> None:
        """When every fetch ends, every sequence finishes: no deadlock, no livelock."""
        for _ in range(3000):
            if self.scheduler.idle:
                break
            self.step(speed=0.02)
            while self.fetching:
                self.fetch_ends_well(0)
        assert self.scheduler.idle, f"stuck: {self.scheduler!r}"
        assert not self.alive

    @invariant()
    def blocks_conserve(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert len(self.scheduler.running) <= self.config.max_running
            rows = {row.seq_id for each in self.alive.values() for row in each.rows}
            assert {s.seq_id for s in self.scheduler.sequences()} == rows
            for sequence in self.alive.values():
                assert sequence.state is not State.FINISHED

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.every_sequence_finishes()
            self.patch.undo()
            self.time_passes(40.0)
            self.scheduler.prefix_loader.retire(prefix.key for prefix in PREFIXES)
            for _ in range(200):
                self.step(speed=0.02)
                while self.fetching:
                    self.fetch_ends_well(0)
            pool, residency = self.scheduler.memory.pool, self.scheduler.memory.residency
            pins = set(residency.pins)
            assert {entry.key for entry in residency} <= pins, (
                "unpinned prefixes are held while idle"
            )
            assert all(e.stage is not Stage.COMPILING for e in residency)
            assert {p.key for p in PREFIXES if p.key in self.scheduler.memory.host} <= pins
            assert pool.num_free + residency.num_blocks == pool.num_usable, "blocks are missing"


TestScheduler = pytest.mark.filterwarnings("default")(SchedulerMachine.TestCase)
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
