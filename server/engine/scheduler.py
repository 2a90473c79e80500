"""The scheduler: which tokens of which sequences run in the next step. Pure bookkeeping.

Order of service within one token budget:

1. decode rows: one token each, so that nobody's stream stalls;
2. prefill chunks of sequences already running;
3. compile chunks of prefixes that have blocks;
4. waiting sequences whose prefix is resident, in fair order;
5. prefixes that waiting sequences need: fetch, or place and compile from the next step on.

When blocks run out: idle prefixes leave first (least recently used), then compiles give their
blocks back, then the youngest running sequence is preempted. The oldest always gets on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.config import SchedulerConfig
from server.engine.fair_queue import FairQueue
from server.engine.memory import Memory
from server.engine.request import FinishReason, PrefixKey
from server.engine.residency import Entry, Residency, Stage
from server.engine.sequence import Sequence, State
from server.engine.step import (
    BlockCopy,
    Chunk,
    CompileChunk,
    Sampled,
    StagedPrefix,
    Step,
    StepOutput,
)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought one sequence: a token, the end, or both."""

    sequence: Sequence
    sampled: Sampled | None
    finished: bool


@dataclass(slots=True)
class _Plan:
    """A step while it is drawn up."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    compiles: list[CompileChunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    fetches: list[PrefixKey] = field(default_factory=list)


class Scheduler:
    """Owns sequences, blocks and residency between steps. Not thread-safe: one caller."""

    def __init__(
        self, config: SchedulerConfig, *, uniform: Callable[[int, int], float] = lambda _s, _i: 0.0
    ) -> None:
        """``uniform(seed, index)`` draws the number in [0, 1) that decides output ``index``."""
        self.config = config
        self.waiting = FairQueue()
        self.memory = Memory(
            num_blocks=config.num_blocks, block_size=config.block_size, waiting=self.waiting
        )
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._uniform = uniform

    @property
    def _residency(self) -> Residency:
        return self.memory.residency

    # -- what happens between steps ----

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Admission has checked that it can ever fit."""
        self.waiting.push(sequence)

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop: str | int | None = None,
        error: str | None = None,
    ) -> None:
        """End a living sequence from outside (abort, stop string, failure) and free everything."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self.memory.free(sequence)
        sequence.finish(reason, stop=stop, error=error)

    def preempt(self, victim: Sequence) -> None:
        """Put a running sequence back to the front of its queue; its KV will be recomputed."""
        self.running.remove(victim)
        self.memory.free(victim)
        victim.preempt()
        self.waiting.push_front(victim)
        self.num_preemptions += 1

    def prefix_staged(self, key: PrefixKey, payload: StagedPrefix) -> list[Sequence]:
        """A fetch ended well. Returns sequences failed because it is not what was announced."""
        entry = self._residency.get(key)
        if entry is None or entry.stage is not Stage.FETCHING:
            return []
        if payload.num_tokens != entry.num_tokens:
            return self.prefix_failed(
                key,
                f"the stored prefix has {payload.num_tokens} virtual tokens, its manifest says "
                f"{entry.num_tokens}",
            )
        self._residency.fetched(key, payload)
        return []

    def prefix_failed(self, key: PrefixKey, message: str) -> list[Sequence]:
        """A fetch or compile failed: the sequences that wait for it fail, and nobody else."""
        entry = self._residency.get(key)
        if entry is not None:
            self._residency.drop(entry)
        failed = [s for s in self.waiting if s.prefix is not None and s.prefix.key == key]
        for sequence in failed:
            self.end(sequence, FinishReason.ERROR, error=message)
        return failed

    def step_failed(self, step: Step, message: str) -> list[Sequence]:
        """The runner raised: what the step carried fails; what waited goes on waiting."""
        carried = {chunk.seq_id for chunk in step.chunks}
        failed = [s for s in self.running if s.seq_id in carried]
        for sequence in failed:
            self.end(sequence, FinishReason.ERROR, error=message)
        for part in step.compiles:
            failed += self.prefix_failed(part.key, message)
        for entry in self._residency.compiling():
            # Placed by this very step: its blocks may not have been zeroed.
            self._residency.unplace(entry)
        return failed

    # -- one step ----

    def schedule(self) -> Step:
        """Draw up the next step. It must be run and handed to ``update`` before the next call."""
        plan = _Plan(budget=self.config.max_tokens_per_step)
        self._continue_decodes(plan)
        self._continue_prefills(plan)
        self._continue_compiles(plan)
        self._admit(plan)
        self._bring_prefixes(plan)
        return Step(
            chunks=tuple(plan.chunks),
            compiles=tuple(plan.compiles),
            copies=tuple(plan.copies),
            fresh=tuple(plan.fresh),
            fetches=tuple(plan.fetches),
        )

    def update(self, step: Step, output: StepOutput) -> list[Progress]:
        """Take in what the step computed; ended sequences have freed everything on return."""
        for part in step.compiles:
            self._residency.compiled(part.key, part.stop)
        by_id = {sequence.seq_id: sequence for sequence in self.running}
        progress = []
        for chunk in step.chunks:
            sequence = by_id[chunk.seq_id]
            sequence.num_computed += len(chunk.tokens)
            if chunk.sampling is not None:
                progress.append(self._take(sequence, output.sampled[chunk.seq_id]))
        return progress

    def _take(self, sequence: Sequence, sampled: Sampled) -> Progress:
        if not sampled.finite:
            self.end(
                sequence,
                FinishReason.ERROR,
                error="the model produced non-finite logits for this request",
            )
            return Progress(sequence, None, finished=True)
        self.waiting.charge(sequence.tenant, 1)
        reason = sequence.append(sampled.token_id)
        if reason is not None:
            stop = sampled.token_id if reason is FinishReason.STOP else None
            self.end(sequence, reason, stop=stop)
        return Progress(sequence, sampled, finished=sequence.finished)

    # -- the parts of a step ----

    def _continue_decodes(self, plan: _Plan) -> None:
        for sequence in tuple(self.running):
            decodes = sequence.state is State.RUNNING and sequence.num_remaining == 1
            if decodes and self._grow(plan, sequence):
                self._run(plan, sequence, 1)

    def _continue_prefills(self, plan: _Plan) -> None:
        started = {chunk.seq_id for chunk in plan.chunks}
        for sequence in self.running:
            if plan.budget == 0:
                return
            if sequence.seq_id not in started:
                self._run(plan, sequence, self._share(plan, sequence.num_remaining))

    def _continue_compiles(self, plan: _Plan) -> None:
        for entry in self._residency.compiling():
            if plan.budget == 0:
                return
            size = self._share(plan, entry.num_tokens - entry.num_compiled)
            assert entry.payload is not None
            plan.compiles.append(
                CompileChunk(
                    key=entry.key,
                    payload=entry.payload,
                    start=entry.num_compiled,
                    stop=entry.num_compiled + size,
                    block_table=tuple(entry.blocks),
                )
            )
            plan.budget -= size

    def _admit(self, plan: _Plan) -> None:
        for sequence in self.waiting.in_order():
            if plan.budget == 0 or len(self.running) >= self.config.max_running:
                return
            if not self.memory.is_resident(sequence):
                continue
            # A block of headroom for each running sequence: admit none just to preempt it again.
            idle = self.memory.idle_prefixes(sequence)
            own = self.memory.own_blocks(sequence)
            room = self.memory.pool.num_free + sum(len(entry.blocks) for entry in idle)
            if room < own + len(self.running) or not self.memory.evict(idle, until=own):
                return
            self._start(plan, sequence)

    def _start(self, plan: _Plan, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.waiting.charge(sequence.tenant, sequence.num_prefix_tokens + len(sequence.tokens))
        fresh, copies = self.memory.hold(sequence)
        plan.fresh += fresh
        plan.copies += copies
        sequence.admit()
        self.running.append(sequence)
        self._run(plan, sequence, self._share(plan, sequence.num_remaining))

    def _bring_prefixes(self, plan: _Plan) -> None:
        """Fetch what waiting sequences lack, and place what has been fetched, in fair order.

        A prefix somebody waits for is never pushed out for one that comes: with nothing running,
        its waiters would just have been admitted, so nobody is stuck behind it.
        """
        for unwanted in self._residency.staged():
            if not self.waiting.wants(unwanted.key):
                self._residency.drop(unwanted)
        coming = self._residency.num_coming
        for sequence in self.waiting.in_order():
            if sequence.prefix is None:
                continue
            entry = self._residency.get(sequence.prefix.key)
            if entry is None:
                if coming < self.config.max_staged:
                    self._residency.want(sequence.prefix)
                    plan.fetches.append(sequence.prefix.key)
                    coming += 1
            elif entry.stage is Stage.STAGED:
                others = self.memory.idle_prefixes(sequence)
                idle = [other for other in others if not self.waiting.wants(other.key)]
                need = self._residency.blocks_needed(entry.num_tokens)
                if self._keep_cap(sequence, entry, idle) and self.memory.evict(idle, until=need):
                    plan.fresh += self._residency.place(entry)

    def _keep_cap(self, sequence: Sequence, entry: Entry, idle: list[Entry]) -> bool:
        """Whether ``entry`` fits under its tenant's cap, for which only its own idle prefixes
        leave (and are taken off ``idle``)."""
        cap, tenant = sequence.request.max_resident_tokens, sequence.tenant
        if cap is None:
            return True
        for own in [other for other in idle if other.key.tenant == tenant]:
            if self._residency.tokens_of(tenant) + entry.num_tokens <= cap:
                break
            self._residency.evict(own)
            idle.remove(own)
        return self._residency.tokens_of(tenant) + entry.num_tokens <= cap

    def _grow(self, plan: _Plan, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its next token needs; False: it was preempted."""
        while self.memory.table_length(sequence) > len(sequence.block_table):
            if self.memory.make_room_for_one():
                block = self.memory.pool.allocate(1)
                plan.fresh += block
                sequence.block_table += block
                continue
            victim = self.running[-1]
            planned = {chunk.seq_id for chunk in plan.chunks}
            assert victim.seq_id not in planned, "the youngest sequence is planned last"
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    # -- small things ----

    def _run(self, plan: _Plan, sequence: Sequence, size: int) -> None:
        start = sequence.num_computed
        last = start + size == len(sequence.tokens)
        sampling = sequence.request.sampling
        stop = sequence.request.stop
        plan.budget -= size
        plan.chunks.append(
            Chunk(
                seq_id=sequence.seq_id,
                tokens=sequence.tokens[start : start + size],
                start=sequence.num_prefix_tokens + start,
                block_table=tuple(sequence.block_table),
                prefix=sequence.prefix.key if sequence.prefix else None,
                sampling=sampling if last else None,
                uniform=self._uniform(sequence.seed, sequence.num_output) if last else 0.0,
                history=tuple(sequence.tokens) if last and sampling.needs_history else (),
                num_prompt_tokens=sequence.num_prompt,
                banned=tuple(stop.token_ids) if sequence.num_output < stop.min_tokens else (),
            )
        )

    def _share(self, plan: _Plan, wanted: int) -> int:
        return min(wanted, plan.budget, self.config.max_prefill_chunk)

    @property
    def idle(self) -> bool:
        """Whether no sequence is alive."""
        return not self.running and not len(self.waiting)

    def check_integrity(self) -> None:
        """Prove that free + used = total and that every reference is held by a living table."""
        self.memory.check_integrity(self.running)
        for sequence in self.waiting:
            assert sequence.state is State.WAITING, f"{sequence} waits and is not waiting"
            assert not sequence.block_table, f"{sequence} waits and holds blocks"

    def __repr__(self) -> str:
        return f"Scheduler(running={len(self.running)}, {self.waiting}, {self.memory})"
