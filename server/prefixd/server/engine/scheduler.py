"""The scheduler: which tokens of which sequences run in the next step. Pure bookkeeping.

Order of service within one token budget:

1. decode rows: one token each, so that nobody's stream stalls;
2. prefill chunks of sequences already running;
3. waiting sequences in fair order: those whose prefix is there start; for the others the prefix is
   fetched, placed and compiled (``arrivals``), all compiles of a step together one chunk;
4. prefixes that are pinned or warmed.

When blocks run out: remembered blocks go first, then idle prefixes (least recently used), then
compiles give their blocks back, then the youngest running sequence is preempted. The oldest always
gets on.

After a step that failed its sequences prove themselves one by one, so that only the one that
breaks a step ends; after a want of memory steps are smaller for a while.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.deadlines import Deadlines
from prefixd.server.engine.fair_queue import LOOKAHEAD, FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.oom_backoff import OomBackoff
from prefixd.server.engine.prefix_loader import PrefixLoader
from prefixd.server.engine.request import FinishReason, PrefixKey
from prefixd.server.engine.sequence import Sequence, State
from prefixd.server.engine.step import Chunk, Sampled, StagedPrefix, Step, StepOutput
from prefixd.server.engine.step_builder import StepBuilder

_PREFETCHED = 64
"""Waiting sequences whose prefixes a step cares for when no more can start."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought one sequence: a token, the end, or both."""

    sequence: Sequence
    sampled: Sampled | None
    finished: bool


class Scheduler:
    """Owns sequences, blocks and residency between steps. Not thread-safe: one caller.

    ``now`` is in seconds on any clock that does not go back.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        uniform: Callable[[int, int], float] = lambda _s, _i: 0.0,
        namespace: str = "",
    ) -> None:
        """``uniform(seed, index)`` draws the number in [0, 1) that decides output ``index``;
        ``namespace`` seeds KV reuse: the model's fingerprint and dtype."""
        self.config = config
        self.waiting = FairQueue()
        self.memory = Memory(config, waiting=self.waiting, namespace=namespace)
        self.prefix_loader = PrefixLoader(config, memory=self.memory, waiting=self.waiting)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.oom_backoff = OomBackoff(config)
        self._uniform = uniform
        self._suspects: deque[Sequence] = deque()
        self._expiries = Deadlines()

    # -- what happens between steps ----

    def add(self, sequence: Sequence, *, now: float = 0.0) -> list[Sequence]:
        """Queue a new sequence. Admission has checked that it can ever fit.

        Returns the sequences that ended by it: itself, when its prefix could not be had a moment
        ago; or those that give way in an overfull queue, the youngest of whoever has most waiting.
        """
        sequence.arrived = now
        if sequence.prefix is not None:
            failure = self.prefix_loader.failure(sequence.prefix.key, now=now)
            if failure is not None:
                message, code = failure
                sequence.finish(FinishReason.ERROR, error=message, error_code=code)
                return [sequence]
        self._expiries.add(sequence, max_queue_wait_s=self.config.max_queue_wait_s)
        self.waiting.push(sequence)
        return self._shed()

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop: str | int | None = None,
        error: str | None = None,
        error_code: str | None = None,
    ) -> None:
        """End a living sequence from outside (abort, stop string, failure) and free everything."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self.memory.free(sequence)
        sequence.finish(reason, stop=stop, error=error, error_code=error_code)

    def expire(self, *, now: float) -> list[Sequence]:
        """End what has run out of time: past its deadline, or too long in the queue."""
        ended = []
        for sequence, reason, error in self._expiries.due(now=now):
            self.end(sequence, reason, error=error)
            ended.append(sequence)
        return ended

    @property
    def next_expiry(self) -> float | None:
        """When ``expire`` has something to do next, at the earliest."""
        return self._expiries.next

    def preempt(self, victim: Sequence) -> None:
        """Put a running sequence back to its place in the queue; its KV will be recomputed."""
        self.running.remove(victim)
        self.memory.free(victim)
        victim.preempt()
        self.waiting.push(victim)
        self.num_preemptions += 1

    def prefix_staged(
        self, key: PrefixKey, payload: StagedPrefix, *, now: float = 0.0
    ) -> list[Sequence]:
        """A fetch ended well. Returns sequences failed because it is not what was announced."""
        message = self.prefix_loader.staged(key, payload)
        return [] if message is None else self.prefix_failed(key, message, now=now)

    def prefix_failed(
        self, key: PrefixKey, message: str, *, code: str | None = None, now: float = 0.0
    ) -> list[Sequence]:
        """A fetch or compile failed: the sequences waiting for the prefix end, and no others."""
        self.prefix_loader.failed(key, message, code=code, now=now)
        failed = [s for s in self.waiting if s.prefix is not None and s.prefix.key == key]
        for sequence in failed:
            self.end(sequence, FinishReason.ERROR, error=message, error_code=code)
        return failed

    def step_failed(
        self, step: Step, message: str, *, now: float = 0.0, out_of_memory: bool = False
    ) -> list[Sequence]:
        """The runner raised: what the step carried starts over, and a part that fails alone ends.

        Returns the sequences that ended.
        """
        carried = {chunk.seq_id for chunk in step.chunks}
        sequences = [s for s in self.running if s.seq_id in carried]
        alone = step.num_parts == 1
        if out_of_memory:
            alone = not self.oom_backoff.shrink(step)
        for entry in self.memory.residency.compiling():
            # Also one placed by this very step: its blocks may not have been zeroed.
            entry.suspect = not out_of_memory and any(p.key == entry.key for p in step.compiles)
            self.memory.residency.unplace(entry)
        if alone:
            for sequence in sequences:
                self.end(sequence, FinishReason.ERROR, error=message)
            return sequences + [
                failed
                for part in step.compiles
                for failed in self.prefix_failed(part.key, message, now=now)
            ]
        for sequence in reversed(sequences):
            sequence.suspect = not out_of_memory
            self.preempt(sequence)
        if not out_of_memory:
            self._suspects.extend(sequences)
        return []

    # -- one step ----

    def schedule(self, *, now: float = 0.0) -> Step:
        """Draw up the next step. It must be run and handed to ``update`` before the next call."""
        builder = StepBuilder(
            budget=self.config.max_tokens_per_step, chunk=self.oom_backoff.max_chunk
        )
        self.prefix_loader.tend(now=now)
        if self._prove(builder, now):
            return builder.step()
        self._continue_decodes(builder)
        self._continue_prefills(builder)
        has_room = self._serve_waiting(builder, now)
        self.prefix_loader.bring_others(builder, now=now, has_room=has_room)
        return builder.step()

    def update(self, step: Step, output: StepOutput) -> list[Progress]:
        """Take in what the step computed; ended sequences have freed everything on return."""
        self.oom_backoff.step_went_well()
        self.prefix_loader.saved(output.saved)
        for part in step.compiles:
            self.memory.residency.compiled(part.key, part.stop)
        by_id = {sequence.seq_id: sequence for sequence in self.running}
        progress = []
        for chunk in step.chunks:
            sequence = by_id[chunk.seq_id]
            sequence.num_computed += len(chunk.tokens)
            if chunk.sampling is not None:
                progress.append(self._take(sequence, output.sampled[chunk.seq_id]))
        return progress

    def _take(self, sequence: Sequence, sampled: Sampled) -> Progress:
        sequence.suspect = False
        if not sampled.finite:
            self.memory.reuse.distrust(sequence)
            self.end(
                sequence,
                FinishReason.ERROR,
                error="the model produced non-finite logits for this request",
            )
            return Progress(sequence, None, finished=True)
        self.memory.reuse.remember(sequence)
        self.waiting.charge(sequence.tenant, 1)
        reason = sequence.append(sampled.token_id)
        if reason is not None:
            stop = sampled.token_id if reason is FinishReason.STOP else None
            self.end(sequence, reason, stop=stop)
        return Progress(sequence, sampled, finished=sequence.finished)

    # -- the parts of a step ----

    def _prove(self, builder: StepBuilder, now: float) -> bool:
        """After a failure: one suspect, alone in a step. False: there is none (any more)."""
        while self._suspects:
            sequence = self._suspects[0]
            if sequence.suspect and sequence.state is State.RUNNING:
                self._run(builder, sequence, builder.share(sequence.num_remaining))
                return True
            if sequence.suspect and sequence.state is State.WAITING:
                if self.memory.is_ready(sequence) and self._start(builder, sequence, now):
                    return True
                sequence.suspect = False  # it cannot run now; it takes its chance with others
            self._suspects.popleft()
        return self.prefix_loader.prove(builder)

    def _continue_decodes(self, builder: StepBuilder) -> None:
        for sequence in tuple(self.running):
            decodes = sequence.state is State.RUNNING and sequence.num_remaining == 1
            if decodes and self._grow(builder, sequence):
                self._run(builder, sequence, 1)

    def _continue_prefills(self, builder: StepBuilder) -> None:
        started = {chunk.seq_id for chunk in builder.chunks}
        for sequence in self.running:
            if builder.budget == 0:
                return
            if sequence.seq_id not in started:
                self._run(builder, sequence, builder.share(sequence.num_remaining))

    def _serve_waiting(self, builder: StepBuilder, now: float) -> bool:
        """Start what can start, in fair order, and bring the prefixes of the others. False: the
        next that could run has no room in the pool."""
        for first in self.memory.first_users():
            # Their turn was before their prefix came; its compile has been charged since.
            if not builder.budget or len(self.running) >= self.oom_backoff.max_running:
                break
            if self.memory.is_ready(first) and not self._start(builder, first, now):
                return False
        room = self.oom_backoff.max_running - len(self.running) if builder.budget else 0
        passed_by: set[str] = set()
        for sequence in self.waiting.in_order(
            ready=self.memory.ready_prefixes() if room > 0 else (),
            depth=max(0, room),
            lookahead=LOOKAHEAD if room > 0 else _PREFETCHED,
        ):
            full = not builder.budget or len(self.running) >= self.oom_backoff.max_running
            if not self.memory.is_ready(sequence):
                if not full:
                    passed_by.add(sequence.tenant)
                    if sequence.due_since is None:
                        sequence.due_since = now
                self.prefix_loader.bring(builder, sequence, now=now)
                continue
            level = self.waiting.counter(sequence.tenant)
            if full or not self._start(builder, sequence, now):
                # Whoever does not fit keeps those behind from taking the room it waits for.
                return full
            for tenant in passed_by - {sequence.tenant}:
                self.waiting.lift(tenant, level)
        return True

    def _start(self, builder: StepBuilder, sequence: Sequence, now: float) -> bool:
        """Let a waiting sequence run if there is room for it."""
        memory = self.memory
        need = memory.blocks_to_start(sequence)
        # A block of headroom for each running sequence: admit none just to preempt it again. And
        # what is kept for a prefix on its way, until nothing runs that could make room for it, but
        # not against the first use of one that came.
        spared = len(self.running)
        if self.running and not memory.is_first_use(sequence):
            spared += self.prefix_loader.reserve
        if memory.pool.num_free < need + spared:
            idle = memory.evictable(sequence, desperate=not self.running)
            room = memory.pool.num_free + sum(len(entry.blocks) for entry in idle)
            if room < need + spared or not memory.make_room(builder, idle, until=need):
                return False
        self.waiting.remove(sequence)
        reused = memory.hold(builder, sequence)
        if sequence.started is None:
            memory.reuse.count(sequence, reused)
            self.waiting.charge(sequence.tenant, sequence.num_prefix_tokens + sequence.num_prompt)
        sequence.admit(num_computed=reused, now=now)
        self.running.append(sequence)
        self._run(builder, sequence, builder.share(sequence.num_remaining))
        return True

    def _grow(self, builder: StepBuilder, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its next token needs; False: it was preempted."""
        while self.memory.table_length(sequence) > len(sequence.block_table):
            if self.memory.make_room_for_one(builder, desperate=len(self.running) == 1):
                block = self.memory.pool.allocate(1)
                builder.fresh += block
                sequence.block_table += block
                continue
            victim = self.running[-1]
            planned = {chunk.seq_id for chunk in builder.chunks}
            assert victim.seq_id not in planned, "the youngest sequence is planned last"
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    # -- small things ----

    def _run(self, builder: StepBuilder, sequence: Sequence, size: int) -> None:
        start = sequence.num_computed
        last = start + size == len(sequence.tokens)
        sampling = sequence.request.sampling
        stop = sequence.request.stop
        builder.run(
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

    def _shed(self) -> list[Sequence]:
        """Have the tenant with most waiting, for its weight, give way in an overfull queue."""
        shed = []
        bound = self.config.max_waiting_tokens
        while bound is not None and self.waiting.num_tokens > bound and len(self.waiting) > 1:
            tenant = max(
                self.waiting.tenants,
                key=lambda t: self.waiting.tokens_of(t) / self.waiting.weight(t),
            )
            unstarted = [s for s in self.waiting.of(tenant) if s.started is None]
            if not unstarted:
                break
            error = f"the server is full: {self.waiting.num_tokens} tokens wait"
            self.end(unstarted[-1], FinishReason.SHED, error=error)
            shed.append(unstarted[-1])
        return shed

    @property
    def proving(self) -> bool:
        """Whether sequences of a failed step are being tried one by one, and all others pause."""
        return any(s.suspect and not s.finished for s in self._suspects) or any(
            entry.suspect for entry in self.memory.residency
        )

    @property
    def idle(self) -> bool:
        """Whether no sequence is alive."""
        return not self.running and not len(self.waiting)

    def sequences(self) -> Iterable[Sequence]:
        """All living sequences."""
        return [*self.running, *self.waiting]

    def check_integrity(self) -> None:
        """Prove that free + used = total and that every reference is held by a living table."""
        self.memory.check_integrity(self.running)
        for sequence in self.waiting:
            assert sequence.state is State.WAITING, f"{sequence} waits and is not waiting"
            assert not sequence.block_table, f"{sequence} waits and holds blocks"

    def __repr__(self) -> str:
        return f"Scheduler(running={len(self.running)}, {self.waiting}, {self.memory})"
