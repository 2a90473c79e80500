"""The parts of a step: what is planned for suspects, running and waiting sequences."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from itertools import chain

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
                self._continue(step, suspect)
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
        decoding: list[Sequence] = []
        for sequence in sequences:
            num_tokens = len(sequence.tokens) + sequence.num_pending
            if num_tokens - sequence.num_computed != 1 or sequence.state is not State.RUNNING:
                continue
            if sequence.num_pending and (sequence.is_complete or self._waits(step, sequence)):
                continue
            if sequence.request.constraint is not None and self._holds(sequence):
                continue
            if sequence.ensemble:
                if sequence.leader is sequence and self._can_decode(step, sequence.ensemble):
                    self._run_ensemble(step, sequence.ensemble)
                    decoding += sequence.ensemble
                continue
            capacity = len(sequence.block_table) * self._memory.block_size
            num_positions = sequence.num_prefix_tokens + num_tokens
            if num_positions <= capacity or self._grow(step, sequence):
                self.run(step, sequence)
                decoding.append(sequence)
        return decoding

    def _can_decode(self, step: Step, rows: Items[Sequence]) -> bool:
        """Whether all rows of an ensemble lack their last token alone, and have a block for it."""
        if any(row.num_remaining > 1 for row in rows):
            return False
        for row in rows:
            num_positions = row.num_prefix_tokens + len(row.tokens) + row.num_pending
            has_place = num_positions <= len(row.block_table) * self._memory.block_size
            if not has_place and not self._grow(step, row):
                return False
        return True

    def continue_prefills(self, step: Step) -> None:
        """Plan the next chunk of each running sequence with more than one token to run."""
        for sequence in self._running:
            if step.budget == 0:
                return
            if sequence.ensemble:
                if sequence.leader is sequence and any(
                    row.num_remaining > 1 for row in sequence.ensemble
                ):
                    self._run_ensemble(step, sequence.ensemble)
            elif sequence.num_remaining > 1:
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
            is_full = is_full or not self._has_places(sequence)
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
            if entry.key not in self._memory.residency.reserved:
                continue  # an ensemble has started that waited for more than one of them
            ready = filter(self._memory.is_ready, self._waiting.under(entry.key))
            sequence = next(ready, None)  # None: an ensemble waits for others too
            if sequence is None or sequence.num_pending:
                continue
            if not self._has_places(sequence) or not self.start(step, sequence, now):
                return False
        return True

    def _has_places(self, sequence: Sequence) -> bool:
        """Whether all rows of ``sequence`` may run next to those that do. One runs alone in any
        case."""
        num_rows = len(self._running) + len(sequence.rows)
        return not self._running or num_rows <= self._recovery.backoff.max_running

    def start(self, step: Step, sequence: Sequence, now: float) -> bool:
        """Let a waiting sequence run if there is room for it."""
        memory = self._memory
        if sequence.request.source and step.num_encoded and step.budget < num_source(sequence):
            step.budget = 0  # the next step begins with it
            return False
        num_running = len(self._running)
        if sequence.background:
            num_running += len(self._background.running)
        rows = sequence.rows
        for row in rows:
            memory.adopt_prefix(row)
        reused = [memory.reuse.find(row) for row in rows]
        if not self._eviction.room_to_start(
            step,
            sequence,
            list(chain.from_iterable(reused)),
            num_running=num_running,
            promised=self._prefix_loader.promised,
            kept=not num_running and not (sequence.background and self._waiting.num_sequences),
        ):
            return False
        (self._background.waiting if sequence.background else self._waiting).remove(sequence)
        memory.remove_waiters(sequence)
        for blocks in reused:
            memory.pool.share(blocks)  # before another row takes them as free ones
        for row, blocks in zip(rows, reused, strict=True):
            self._admit(step, row, blocks, now)
        self._continue(step, sequence)
        return True

    def _admit(self, step: Step, sequence: Sequence, reused: list[int], now: float) -> None:
        memory, background = self._memory, self._background
        num_reused = memory.hold(step, sequence, reused)
        if sequence.started is None:
            memory.reuse.count(sequence, num_reused)
            num_prompt = len(sequence.request.source or sequence.request.prompt)
            waiting = background.waiting if sequence.background else self._waiting
            waiting.charge(sequence.tenant, sequence.num_attended + num_prompt)
        sequence.admit(num_computed=num_reused, now=now)
        (background.running if sequence.background else self._running).append(sequence)

    def _grow(self, step: Step, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its next token needs; False: it was preempted."""
        running = self._background.running if sequence.background else self._running
        while not self._has_block(step, sequence):
            youngest = running[-1]
            planned = {chunk.seq_id for chunk in step.chunks}
            assert youngest.seq_id not in planned, "the youngest sequence is planned last"
            self._preempt(youngest)
            if sequence.state is not State.RUNNING:
                return False
        block = self._memory.pool.allocate(1)
        step.fresh += block
        sequence.block_table += block
        return True

    def _has_block(self, step: Step, sequence: Sequence) -> bool:
        """Make room for one block for a running sequence."""
        num_running = len(self._running)
        if not sequence.background:
            alone = num_running == len(sequence.rows)
            return self._eviction.room_for_block(step, alone=alone)
        num_alive = num_running + self._waiting.num_sequences + len(self._background.running)
        return self._eviction.room_for_background_block(step, alone=num_alive == 1)

    def _continue(self, step: Step, sequence: Sequence) -> None:
        """Plan the next tokens of a running sequence, with its ensemble."""
        if sequence.ensemble:
            self._run_ensemble(step, sequence.ensemble)
        else:
            self.run(step, sequence)

    def _run_ensemble(self, step: Step, rows: Items[Sequence]) -> None:
        """Plan the next tokens of an ensemble. The last tokens of its rows run in one step, which
        samples the next one for all of them."""
        sizes = [row.num_remaining for row in rows]
        if sum(sizes) <= step.budget and all(
            size == self._size(step, row) for row, size in zip(rows, sizes, strict=True)
        ):
            for row in rows:
                self.run(step, row)
            return
        for row, size in zip(rows, sizes, strict=True):
            if size > 1 and step.budget > 0:
                self.run(step, row, upto=len(row.tokens) - 1)

    def _size(self, step: Step, sequence: Sequence) -> int:
        """The tokens of a running sequence that the step has room for."""
        start = sequence.num_computed
        num_tokens = len(sequence.tokens) + sequence.num_pending
        size = min(num_tokens - start, step.budget, step.max_chunk)
        if size > _LARGE_CHUNK:
            num_seen = sequence.num_prefix_tokens + start + size
            size = max(_LARGE_CHUNK, min(size, _MAX_SCORES // num_seen))
        if sequence.next_target is not None:
            unscored = max(0, sequence.next_target - 1 - start)
            size = min(size, unscored + max(1, step.max_scored))
        return size

    def run(self, step: Step, sequence: Sequence, *, upto: int | None = None) -> None:
        """Plan the next tokens of a running sequence: as many as the step has room for, and none
        from place ``upto`` on."""
        start, num_pending = sequence.num_computed, sequence.num_pending
        num_tokens = len(sequence.tokens) + num_pending
        size = 1 if num_tokens - start == 1 else self._size(step, sequence)
        if upto is not None:
            size = min(size, upto - start)
        request = sequence.request
        sampling, stop = request.sampling, request.stop
        is_last = start + size == num_tokens and stop.max_tokens > 0
        ensemble = sequence.ensemble[0].seq_id if sequence.ensemble else None
        is_sampled = is_last and (ensemble is None or ensemble == sequence.seq_id)
        is_drawn = is_sampled and sampling.temperature > 0
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
                history=tuple(sequence.tokens) if is_sampled and sampling.needs_history else (),
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
                ensemble=ensemble,
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
            if request.constraint is not None and is_sampled:
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
