"""The scheduler: which tokens of which sequences run in the next step. Pure bookkeeping.

Order of service within the token budget of a step (``step_builder`` has the parts):

1. decode rows: one token each, so that no stream stalls;
2. prefill chunks of sequences that already run;
3. waiting sequences in fair order: those whose prefix is resident start; for the others the prefix
   is fetched, placed and compiled (``prefix_loader``), all compiles of a step together one chunk;
4. prefixes that are pinned or preloaded;
5. proposed tokens of sequences that decode (``speculation``);
6. sequences of the background class, and their prefixes (``background``).

``eviction`` has the rules for when blocks run out, ``starvation`` those for a tenant of which
nothing runs, ``recovery`` those for failed steps. The oldest running sequence always advances.

The next step may be planned while steps are in flight. What a step changes is split in two::

    once it is planned    tokens computed, a token pending, tokens of a prefix compiled
    once it is collected  which token, how a sequence ends by it, its charge, blocks to reuse,
                          accepted drafts, a prefix resident

Blocks that are released go to the next step at once, although rows of a step in flight may still
use them: a runner performs steps one after the other.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from prefixd.server.engine.background import Background
from prefixd.server.engine.background_builder import BackgroundBuilder
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.eviction import EvictionPolicy
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.new_tokens import NewTokens
from prefixd.server.engine.prefix_loader import PrefixLoader
from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.recovery import Recovery
from prefixd.server.engine.request import FinishReason, PrefixKey
from prefixd.server.engine.sequence import Deadlines, End, Sequence, State
from prefixd.server.engine.speculation import Speculation
from prefixd.server.engine.starvation import StarvationPolicy
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.engine.step_budget import StepBudget
from prefixd.server.engine.step_builder import StepBuilder


class Scheduler:
    """Owns sequences, blocks and residency between steps. Not thread-safe: one caller.

    ``now`` is in seconds on any clock that does not go back.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        uniform: Callable[[int, int], float] = lambda _seed, _index: 0.0,
        flush: Callable[[Sequence, End], End] = lambda _sequence, end: end,
        holds: Callable[[Sequence], bool] = lambda _sequence: False,
        namespace: str = "",
    ) -> None:
        """``uniform(seed, index)`` draws the number in [0, 1) that selects output ``index``.
        ``flush(sequence, end)`` is called once for each sequence, before it ends: it sends the last
        text, and returns the end after that. ``holds(sequence)``: whether a sequence that decodes
        under a constraint is left out of the next step. ``namespace`` seeds KV reuse: the
        model's fingerprint and dtype."""
        self.config = config
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.memory = Memory(config, namespace=namespace)
        self.background = Background(residency=self.memory.residency, preempt=self.preempt)
        self.eviction = EvictionPolicy(
            config, memory=self.memory, yield_blocks=self.background.yield_blocks
        )
        self.prefix_loader = PrefixLoader(
            config,
            memory=self.memory,
            waiting=self.waiting,
            eviction=self.eviction,
            background=self.background,
        )
        self.recovery = Recovery(config, residency=self.memory.residency)
        self.deadlines = Deadlines()
        self.step_budget = StepBudget(config.max_token_gap_s)
        self.speculation = Speculation(
            enabled=config.speculate and not config.state_blocks,
            memory=self.memory,
            prefix_loader=self.prefix_loader,
            recovery=self.recovery,
            uniform=uniform,
        )
        self._new_tokens = NewTokens(
            waiting=self.waiting,
            background=self.background,
            memory=self.memory,
            recovery=self.recovery,
            speculation=self.speculation,
        )
        self.num_preemptions = 0
        self.in_flight: deque[Step] = deque()
        self._living: dict[int, Sequence] = {}
        self._flush = flush
        self._starvation = StarvationPolicy(
            config, waiting=self.waiting, running=self.running, memory=self.memory
        )
        self._builder = StepBuilder(
            waiting=self.waiting,
            running=self.running,
            background=self.background,
            memory=self.memory,
            eviction=self.eviction,
            prefix_loader=self.prefix_loader,
            recovery=self.recovery,
            preempt=self.preempt,
            waits=self._waits,
            holds=holds,
            uniform=uniform,
        )
        self.background_builder = BackgroundBuilder(
            config,
            background=self.background,
            waiting=self.waiting,
            running=self.running,
            builder=self._builder,
            memory=self.memory,
            prefix_loader=self.prefix_loader,
            recovery=self.recovery,
            step_budget=self.step_budget,
            speculation=self.speculation,
            holds=holds,
        )

    # -- between steps ----

    def add(self, sequence: Sequence, *, now: float = 0.0) -> list[Sequence]:
        """Queue a new sequence. Admission has checked that it can ever fit.

        Returns the sequences that this ended: itself, if its prefix has recently failed to load,
        or those that were shed from an overfull queue.
        """
        assert not (sequence.ensemble and sequence.background), "no ensemble is of that class"
        sequence.arrived = now
        for row in sequence.rows if self.prefix_loader.failures else ():
            key = row.prefix.key if row.prefix is not None else None
            failure = None if key is None else self.prefix_loader.failure(key, now=now)
            if failure is not None:
                message, code = failure
                sequence.finish(End(FinishReason.ERROR, error=message, error_code=code))
                return [sequence]
        max_queue_wait_s = None if sequence.background else self.config.max_queue_wait_s
        if max_queue_wait_s is not None or sequence.request.timeout_s is not None:
            self.deadlines.add(sequence, max_queue_wait_s=max_queue_wait_s)
        self._living.update((row.seq_id, row) for row in sequence.rows)
        self.background.num_alive += sequence.background
        self._enqueue(sequence)
        bound = self.config.max_waiting_tokens
        return [] if bound is None or self.waiting.num_tokens <= bound else self._shed(bound)

    def end(self, sequence: Sequence, end: End) -> None:
        """End a living sequence, with its ensemble, and free everything it holds. Only the leader
        of an ensemble is one to be reported."""
        leader = sequence.leader
        if leader.state is State.WAITING:
            self._dequeue(leader)
        elif leader.state is State.RUNNING:
            self._stop(leader)
        for row in leader.rows:
            del self._living[row.seq_id]
        self.background.num_alive -= leader.background
        end = self._flush(leader, end)
        for row in leader.rows:
            row.finish(end)

    def expire(self, *, now: float) -> list[Sequence]:
        """End the sequences that have timed out, or waited too long in the queue."""
        expired = []
        for sequence, end in self.deadlines.expired(now=now):
            self.end(sequence, end)
            expired.append(sequence)
        return expired

    def preempt(self, sequence: Sequence) -> None:
        """Put a running sequence, with its ensemble, back to its place in the queue; its KV will be
        recomputed."""
        leader = sequence.leader
        self._stop(leader)
        for row in leader.rows:
            row.preempt()
        self._enqueue(leader)
        if leader.background:
            self.background.num_preemptions += 1
        else:
            self.num_preemptions += 1

    def _stop(self, leader: Sequence) -> None:
        for row in leader.rows:
            self._running_of(row).remove(row)
            self.memory.free(row)

    def prefix_staged(
        self, key: PrefixKey, payload: StagedPrefix, *, now: float = 0.0
    ) -> list[Sequence]:
        """A fetch succeeded. Returns the sequences that ended because its payload is unusable."""
        message = self.prefix_loader.staged(key, payload)
        return [] if message is None else self.prefix_failed(key, message, now=now)

    def prefix_failed(
        self, key: PrefixKey, message: str, *, code: str | None = None, now: float = 0.0
    ) -> list[Sequence]:
        """A fetch or compile failed: the sequences waiting for the prefix end, and no others."""
        self.prefix_loader.failed(key, message, code=code, now=now)
        waiting = chain(self.waiting, self.background.waiting)
        failed = [s for s in waiting if any(r.prefix and r.prefix.key == key for r in s.rows)]
        for sequence in failed:
            self.end(sequence, End(FinishReason.ERROR, error=message, error_code=code))
        return failed

    def step_failed(
        self,
        step: Step,
        message: str,
        *,
        now: float = 0.0,
        out_of_memory: bool = False,
        alone: bool = True,
    ) -> list[Sequence]:
        """The runner raised for ``step``, the oldest in flight. Its parts, and those of the steps
        behind it, start over, or end if ``recovery`` requires it; what the steps behind it compute
        is not to be applied. ``alone``: no earlier step was in flight when it began.

        Returns the sequences that ended.
        """
        steps = [step, *(later for later in self.in_flight if later is not step)]
        self.in_flight.clear()
        self.memory.saving.difference_update(save.key for each in steps for save in each.saves)
        in_steps = {chunk.seq_id for each in steps for chunk in each.chunks} & self._living.keys()
        leaders = {self._living[seq_id].leader for seq_id in in_steps}
        sequences = sorted(leaders, key=lambda leader: leader.seq_id)
        for row in chain.from_iterable(sequence.rows for sequence in sequences):
            row.discard_pending()
        alone = alone and len(steps) == 1
        if not self.recovery.step_failed(
            steps, sequences, out_of_memory=out_of_memory, alone=alone
        ):
            running = [*self.running, *self.background.running]
            for sequence in reversed([s for s in running if s in leaders]):
                self.preempt(sequence)
            return []
        for sequence in sequences:
            self.end(sequence, End(FinishReason.ERROR, error=message))
        for part in step.compiles:
            sequences += self.prefix_failed(part.key, message, now=now)
        return sequences

    def _enqueue(self, sequence: Sequence) -> None:
        (self.background.waiting if sequence.background else self.waiting).push(sequence)
        self.memory.add_waiters(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        (self.background.waiting if sequence.background else self.waiting).remove(sequence)
        self.memory.remove_waiters(sequence)

    def _running_of(self, sequence: Sequence) -> list[Sequence]:
        return self.background.running if sequence.background else self.running

    def _shed(self, bound: int) -> list[Sequence]:
        """End queued sequences until at most ``bound`` tokens wait, or only one sequence."""
        shed = []
        while self.waiting.num_tokens > bound and self.waiting.num_sequences > 1:
            sequence = self.waiting.next_to_shed()
            if sequence is None:
                break
            error = f"the server is full: {self.waiting.num_tokens} tokens wait"
            self.end(sequence, End(FinishReason.SHED, error=error))
            shed.append(sequence)
        return shed

    # -- one step ----

    def schedule(self, *, now: float = 0.0) -> Step:
        """Plan the next step. One with work must be submitted, and passed to ``update`` or
        ``step_failed`` in the order of these calls.

        At most one step may be in flight, and none while ``recovery.proving``.
        """
        step = self._plan(now)
        if step.has_work:
            self.in_flight.append(step)
        return step

    def _plan(self, now: float) -> Step:
        step = Step(
            budget=self.config.max_tokens_per_step,
            max_chunk=self.recovery.backoff.max_chunk,
            max_scored=self.config.max_scored,
        )
        self.prefix_loader.start_step(now=now)
        if self.recovery.suspects and self._builder.run_suspect(step, now):
            return step
        if self.waiting.num_sequences:
            victim = self._starvation.victim(now=now)
            if victim is not None:
                victim.num_yields += 1
                self.preempt(victim)
        decoding = self._builder.continue_decodes(step, tuple(self.running))
        self._limit_prompts(step)
        if len(step.chunks) < len(self.running):
            self._builder.continue_prefills(step)
        has_room = not self.waiting.num_sequences or self._builder.serve_waiting(step, now)
        self.prefix_loader.load_others(step, now=now, has_room=has_room)
        self.speculation.add_drafts(step, decoding)
        if self.background.num_alive:
            self.background_builder.add_parts(step, now=now)
        return step

    def _limit_prompts(self, step: Step) -> None:
        """Bound the prompt tokens of a step whose decode rows are planned. While several prompts or
        prefixes need tokens, one gets at most half of them: a short one does not wait for the end
        of a long one."""
        num_decoding = len(step.chunks)
        limit = self.step_budget.prompt_tokens(num_decoding=num_decoding)
        if limit is not None:
            step.limit(limit)
        self._builder.pay_overdraft(step)
        places = self.recovery.backoff.max_running - len(self.running)
        claims = min(self.waiting.num_sequences, max(0, places))
        if num_decoding < len(self.running):
            claims += sum(sequence.num_remaining > 1 for sequence in self.running)
        num_loading = self.memory.residency.num_loading
        if num_loading:
            num_loading -= self.background.num_loading
        if claims + num_loading > 1:
            step.max_chunk = min(step.max_chunk, max(1, -(-step.budget // 2)))

    def _waits(self, step: Step, sequence: Sequence) -> bool:
        if (
            sequence.background and self.running
        ):  # a step next to the foreground has no drafts of it
            return sequence.verifies
        return self.speculation.waits(step, sequence, rows=len(self._running_of(sequence)))

    def observe(self, step: Step, seconds: float, *, period_s: float | None = None) -> None:
        """Take in how long a step took, and how long after the one before it was collected."""
        self.step_budget.observe(step, seconds)
        self.speculation.observe(step, seconds)
        if self.background.num_alive:
            self.background_builder.share.observe(step, seconds if period_s is None else period_s)

    def update(
        self, step: Step, output: StepOutput, ends: Mapping[int, End] | None = None
    ) -> list[Sequence]:
        """Apply what the oldest step in flight computed. Returns the sequences that ended.

        ``ends`` says which sequences end with the last of their new tokens, by sequence id; without
        it their tokens decide. Rows of sequences that have ended since are dropped.
        """
        if step.has_work:
            assert self.in_flight.popleft() is step, "steps are collected in order"
        if self.recovery.backoff.is_reduced:
            self.recovery.backoff.step_succeeded()
        if output.saved:
            self.prefix_loader.saved(output.saved)
        for part in step.compiles:
            self.prefix_loader.compiled(part)
        ended = []
        for chunk in step.chunks:
            sequence = self._living.get(chunk.seq_id)
            if sequence is None:
                continue
            end = None
            if chunk.targets is not None:
                end = self._new_tokens.take_scores(sequence, chunk, output.scored[chunk.seq_id])
            if end is None:
                if chunk.sampling is not None:
                    # The rows of an ensemble get the tokens of the first, unless it has ended.
                    first = chunk.seq_id if chunk.ensemble is None else chunk.ensemble
                    sampled = output.sampled[first]
                    end = self._new_tokens.take(sequence, chunk, sampled, ends)
                elif not sequence.request.stop.max_tokens:
                    end = self._new_tokens.end_of_prompt(sequence, chunk)
            if end is not None:
                self.end(sequence, end)
                ended.append(sequence)
        return ended

    # -- inspection ----

    @property
    def idle(self) -> bool:
        """Whether no sequence is alive."""
        has_foreground = self.running or self.waiting.num_sequences
        return not has_foreground and not self.background.num_alive

    def sequences(self) -> Iterable[Sequence]:
        """All living sequences."""
        background = self.background
        waiting = chain.from_iterable(sequence.rows for sequence in self.waiting)
        return [*self.running, *waiting, *background.running, *background.waiting]

    def check_integrity(self) -> None:
        """Prove that free + used = total and that every reference is held by a living table."""
        background, residency = self.background, self.memory.residency
        self.memory.check_integrity([*self.running, *background.running])
        self._check_queue(self.waiting, residency.waiters)
        self._check_queue(background.waiting, residency.background_waiters)
        plain = [each.prefix for each in self.waiting if each.prefix and not each.ensemble]
        alone = Counter(prefix.key for prefix in plain)
        assert residency.alone == alone, "those that wait for one prefix differ from the queue"
        assert all(s.background for s in chain(background.running, background.waiting))
        assert background.num_alive == len(background.running) + len(background.waiting)
        assert not any(s.background for s in chain(self.running, self.waiting))
        living = {sequence.seq_id: sequence for sequence in self.sequences()}
        assert living == self._living, "the living sequences differ from queue and running ones"
        pending = Counter(
            chunk.seq_id for step in self.in_flight for chunk in step.chunks if chunk.sampling
        )
        for seq_id, sequence in living.items():
            assert sequence.num_pending == pending[seq_id], f"{sequence} and the steps in flight"
            assert sequence.state is sequence.leader.state, f"{sequence} and its ensemble"
            leader = sequence.leader
            same = sequence.tokens[sequence.num_prompt :] == leader.tokens[leader.num_prompt :]
            assert same, f"{sequence} has other tokens than its ensemble"

    @staticmethod
    def _check_queue(waiting: FairQueue, counted: Counter[PrefixKey]) -> None:
        waiters: Counter[PrefixKey] = Counter()
        for sequence in chain.from_iterable(each.rows for each in waiting):
            assert sequence.state is State.WAITING, f"{sequence} is queued and not waiting"
            assert not sequence.num_blocks, f"{sequence} waits and holds blocks"
            if sequence.prefix is not None:
                waiters[sequence.prefix.key] += 1
        assert counted == waiters, "waiters differ from the queue"

    def __repr__(self) -> str:
        running = len(self.running)
        return f"Scheduler(running={running}, {self.waiting}, {self.background}, {self.memory})"
