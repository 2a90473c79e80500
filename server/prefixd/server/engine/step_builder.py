"""The parts of a step: what is planned for suspects, running and waiting sequences."""

from collections.abc import Callable
from collections.abc import Sequence as Items

from prefixd.server.engine.background import Background
from prefixd.server.engine.entries import Entry
from prefixd.server.engine.eviction import EvictionPolicy
from prefixd.server.engine.fair_queue import LOOKAHEAD, FairQueue
from prefixd.server.engine.inputs import parts_within
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.prefix_loader import PrefixLoader
from prefixd.server.engine.recovery import Recovery
from prefixd.server.engine.sequence import Sequence, State
from prefixd.server.engine.step import PENDING, Chunk, Source, Step

_PENDING = (PENDING,)
_LARGE_CHUNK, _MAX_SCORES = 256, 2**24
"""A chunk above _LARGE_CHUNK tokens has at most _MAX_SCORES pairs of a token and a position that it
sees: attention may need memory for each of them."""

_LOOKAHEAD_WHEN_FULL = 64
"""Waiting sequences whose prefixes a step loads when no more sequences can start."""


class StepBuilder:
    """Adds parts to a step, within its budget. It shares the scheduler's queue and running list,
    and moves sequences between them."""

    def __init__(
        self,
        *,
        waiting: FairQueue,
        running: list[Sequence],
        background: Background,
        memory: Memory,
        eviction: EvictionPolicy,
        prefix_loader: PrefixLoader,
        recovery: Recovery,
        preempt: Callable[[Sequence], None],
        waits: Callable[[Step, Sequence], bool],
        holds: Callable[[Sequence], bool],
        uniform: Callable[[int, int], float],
    ) -> None:
        """``waits(step, sequence)``: whether a sequence whose last token is pending runs in no step
        before that has come. ``holds(sequence)``: whether one under a constraint is left out."""
        self._waiting = waiting
        self._running = running
        self._background = background
        self._memory = memory
        self._eviction = eviction
        self._prefix_loader = prefix_loader
        self._recovery = recovery
        self._preempt = preempt
        self._waits = waits
        self._holds = holds
        self._uniform = uniform
        self._overdraft = 0

    def run_suspect(self, step: Step, now: float) -> bool:
        """Plan the next suspect of a failed step, alone; False: there is none that can run."""
        while (suspect := self._recovery.next_suspect()) is not None:
            if isinstance(suspect, Entry):
                is_planned = self._prefix_loader.compile_alone(step, suspect)
            elif suspect.state is State.RUNNING:
                self.run(step, suspect)
                is_planned = True
            else:
                is_planned = self._memory.is_ready(suspect) and self.start(step, suspect, now)
            if is_planned:
                return True
            del self._recovery.suspects[suspect]  # it cannot run now: it is served with the others
        return False

    def continue_decodes(self, step: Step, sequences: Items[Sequence]) -> list[Sequence]:
        """Plan one token for each of the ``sequences`` that decodes. Returns those planned.

        A token that is pending is run all the same, unless the sequence ends with it at the latest,
        or gains by waiting for it.
        """
        decoding = []
        for sequence in sequences:
            num_tokens = len(sequence.tokens) + sequence.num_pending
            if num_tokens - sequence.num_computed != 1 or sequence.state is not State.RUNNING:
                continue
            if sequence.num_pending and (sequence.is_complete or self._waits(step, sequence)):
                continue
            if sequence.request.constraint is not None and self._holds(sequence):
                continue
            capacity = len(sequence.block_table) * self._memory.block_size
            num_positions = sequence.num_prefix_tokens + num_tokens
            if num_positions <= capacity or self._grow(step, sequence):
                self.run(step, sequence)
                decoding.append(sequence)
        return decoding

    def continue_prefills(self, step: Step) -> None:
        """Plan the next chunk of each running sequence with more than one token to run."""
        for sequence in self._running:
            if step.budget == 0:
                return
            if sequence.num_remaining > 1:
                self.run(step, sequence)

    def serve_waiting(self, step: Step, now: float) -> bool:
        """Start the sequences that can start, in fair order, and load the prefixes of the others.
        False: the next that could run has no room in the pool."""
        if not self._start_reserved(step, now):
            return False
        residency, max_running = self._memory.residency, self._recovery.backoff.max_running
        room = max(0, max_running - len(self._running)) if step.budget else 0
        ready = tuple(residency.ready) if room else ()
        passed_over: set[str] = set()
        for sequence in self._waiting.in_order(
            ready=ready, depth=room, lookahead=LOOKAHEAD if room else _LOOKAHEAD_WHEN_FULL
        ):
            if sequence.num_pending:
                continue  # preempted while a step samples its next token
            is_full = not step.budget or len(self._running) >= max_running
            if not self._memory.is_ready(sequence):
                if not is_full:
                    passed_over.add(sequence.tenant)
                    if sequence.due_since is None:
                        sequence.due_since = now
                self._prefix_loader.load(step, sequence, now=now)
                continue
            level = self._waiting.counter(sequence.tenant)
            if is_full or not self.start(step, sequence, now):
                # A sequence that does not fit blocks those behind it, or they would take its room.
                return is_full or not step.budget
            for tenant in passed_over - {sequence.tenant}:
                self._waiting.lift(tenant, level)
        return True

    def _start_reserved(self, step: Step, now: float) -> bool:
        """Start the first waiting sequence of each prefix that was forced in and not yet used: its
        turn was before its prefix came, and the compile has been charged since. False: one has no
        room."""
        for entry in tuple(self._memory.residency.reserved.values()):
            if not step.budget or len(self._running) >= self._recovery.backoff.max_running:
                break
            sequence = self._waiting.first_under(entry.key)
            if sequence.num_pending:
                continue
            if self._memory.is_ready(sequence) and not self.start(step, sequence, now):
                return False
        return True

    def start(self, step: Step, sequence: Sequence, now: float) -> bool:
        """Let a waiting sequence run if there is room for it."""
        memory = self._memory
        if sequence.request.source and step.num_encoded and step.budget < num_source(sequence):
            step.budget = 0  # the next step begins with it
            return False
        if sequence.background:
            waiting, running = self._background.waiting, self._background.running
            num_running = len(running) + len(self._running)
        else:
            waiting, running = self._waiting, self._running
            num_running = len(running)
        memory.adopt_prefix(sequence)
        reused = memory.reuse.find(sequence)
        if not self._eviction.room_to_start(
            step,
            sequence,
            reused,
            num_running=num_running,
            promised=self._prefix_loader.promised,
            kept=not num_running and not (sequence.background and self._waiting.num_sequences),
        ):
            return False
        waiting.remove(sequence)
        if sequence.prefix is not None:
            is_background = sequence.background
            memory.residency.remove_waiter(sequence.prefix.key, background=is_background)
        num_reused = memory.hold(step, sequence, reused)
        if sequence.started is None:
            memory.reuse.count(sequence, num_reused)
            num_prompt = sequence.request.num_prompt_tokens
            waiting.charge(sequence.tenant, sequence.num_attended + num_prompt)
        sequence.admit(num_computed=num_reused, now=now)
        running.append(sequence)
        self.run(step, sequence)
        return True

    def _grow(self, step: Step, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its next token needs; False: it was preempted."""
        running = self._background.running if sequence.background else self._running
        while not self._has_block(step, sequence):
            youngest = running[-1]
            planned = {chunk.seq_id for chunk in step.chunks}
            assert youngest.seq_id not in planned, "the youngest sequence is planned last"
            self._preempt(youngest)
            if youngest is sequence:
                return False
        block = self._memory.pool.allocate(1)
        step.fresh += block
        sequence.block_table += block
        return True

    def _has_block(self, step: Step, sequence: Sequence) -> bool:
        """Make room for one block for a running sequence."""
        num_running = len(self._running)
        if not sequence.background:
            return self._eviction.room_for_block(step, alone=num_running == 1)
        num_alive = num_running + self._waiting.num_sequences + len(self._background.running)
        return self._eviction.room_for_background_block(step, alone=num_alive == 1)

    def run(self, step: Step, sequence: Sequence) -> None:
        """Plan the next tokens of a running sequence: as many as the step has room for."""
        start, num_pending = sequence.num_computed, sequence.num_pending
        num_tokens = len(sequence.tokens) + num_pending
        size = min(num_tokens - start, step.budget, step.max_chunk)
        if size > _LARGE_CHUNK:
            num_seen = sequence.num_prefix_tokens + start + size
            size = max(_LARGE_CHUNK, min(size, _MAX_SCORES // num_seen))
        if sequence.next_target is not None:
            unscored = max(0, sequence.next_target - 1 - start)
            size = min(size, unscored + max(1, step.max_scored))
        request = sequence.request
        sampling, stop = request.sampling, request.stop
        is_last = start + size == num_tokens and stop.max_tokens > 0
        is_drawn = is_last and sampling.temperature > 0
        num_output = num_tokens - sequence.num_prompt
        step.chunks.append(
            Chunk(
                seq_id=sequence.seq_id,
                tokens=_PENDING if num_pending else sequence.tokens[start : start + size],
                start=sequence.num_prefix_tokens + start,
                block_table=tuple(sequence.block_table),
                prefix=sequence.prefix.key if sequence.prefix else None,
                sampling=sampling if is_last else None,
                uniform=self._uniform(sequence.seed, num_output) if is_drawn else 0.0,
                history=tuple(sequence.tokens) if is_last and sampling.needs_history else (),
                num_prompt_tokens=sequence.num_prompt,
                banned=tuple(stop.token_ids) if num_output < stop.min_tokens else (),
                num_prefix_tokens=sequence.num_prefix_tokens,
                side_blocks=tuple(sequence.side_blocks),
                inputs=(
                    tuple(parts_within(request.inputs, start, start + size))
                    if request.inputs
                    else ()
                ),
                gated=sequence.gated,
                source=self._encode(step, sequence) if request.source else None,
            )
        )
        if sequence.next_target is not None:
            targets = step.chunks[-1].targets = sequence.targets(start, size)
            step.max_scored -= len(targets.tokens) if targets is not None else 0
        step.budget = max(0, step.budget - size)
        # What is certain once the step is submitted; ``Scheduler.update`` has the rest.
        sequence.num_computed += size
        if is_last:
            sequence.num_pending += 1
            if request.constraint is not None:
                step.masked.append(sequence.seq_id)

    def _encode(self, step: Step, sequence: Sequence) -> Source:
        """The input of a sequence of an encoder-decoder: its encoder runs in one pass, with the
        first chunk after a start. What exceeds the step's budget is taken from later ones."""
        num_tokens = num_source(sequence)
        if sequence.num_computed:
            return Source(num_tokens)
        self._overdraft += max(0, num_tokens - step.budget)
        step.budget = max(0, step.budget - num_tokens)
        return Source(num_tokens, sequence.request.source)

    def pay_overdraft(self, step: Step) -> None:
        """Take from the budget for prompts what encoders had in excess of earlier ones. To be
        called when the decode rows are planned: where there are none, no stream waits."""
        if not step.chunks:
            self._overdraft = 0
        paid = min(self._overdraft, step.budget)
        if paid:
            self._overdraft -= paid
            step.limit(step.budget - paid)


def num_source(sequence: Sequence) -> int:
    """Positions of a sequence's encoder: those of a soft prompt, and of its input."""
    prefix, source = sequence.prefix, sequence.request.source
    return len(source) + (prefix.num_tokens if prefix is not None and prefix.gated else 0)
