"""What sampled tokens change once their step was collected."""

from collections.abc import Mapping
from collections.abc import Sequence as Items

from prefixd.server.engine.background import Background
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.recovery import Recovery
from prefixd.server.engine.request import FinishReason, PromptScore
from prefixd.server.engine.sequence import End, Sequence, State
from prefixd.server.engine.speculation import Speculation
from prefixd.server.engine.step import Chunk, Sampled


class NewTokens:
    """Gives sequences their tokens, charges their tenants, and registers blocks for reuse."""

    def __init__(
        self,
        *,
        waiting: FairQueue,
        background: Background,
        memory: Memory,
        recovery: Recovery,
        speculation: Speculation,
    ) -> None:
        self._waiting = waiting
        self._background = background
        self._memory = memory
        self._recovery = recovery
        self._speculation = speculation

    def take(
        self,
        sequence: Sequence,
        chunk: Chunk,
        sampled: Items[Sampled],
        ends: Mapping[int, End] | None,
    ) -> End | None:
        """Give a living sequence what was ``sampled`` for its ``chunk``; returns how it ends by
        that. If it was preempted since, only the tokens count. ``ends`` as for
        ``Scheduler.update``."""
        sequence.num_pending -= 1
        sequence.verifies = False
        num_before = len(sequence.tokens)
        num_computed = chunk.start - sequence.num_prefix_tokens + len(chunk.tokens)
        finite = True
        for index, token in enumerate(sampled):
            finite = token.finite
            if not finite and chunk.draft is not None:
                break  # it is computed again, without a draft
            if index:  # the KV of an accepted token was computed with it; that of the last one not
                num_computed += 1
            if ends is None:
                end = sequence.end_after(token.token_id)
            else:
                end = ends.get(chunk.seq_id) if index == len(sampled) - 1 else None
            end = self._append(sequence, chunk, token, end, num_computed)
            if end is not None:
                return end
        if chunk.draft is not None:
            num_new = len(sequence.tokens) - num_before
            sequence.num_computed = num_computed if num_new else num_computed - len(chunk.tokens)
            self._speculation.verified(sequence, chunk, num_new=num_new, finite=finite)
        return None

    def take_scores(
        self, sequence: Sequence, chunk: Chunk, scores: Items[PromptScore] | None
    ) -> End | None:
        """Note that the scores of a chunk have come; returns how the sequence ends by that."""
        if scores is None:
            return self._not_finite(sequence, chunk)
        first, new = sequence.untaken(chunk, scores)
        sequence.take_scores(first + len(new))
        if sequence.state is State.RUNNING:
            # Fewer are in the pool where it was preempted and has begun again since.
            num_computed = min(first + len(new) - 1, sequence.num_computed)
            self._memory.reuse.remember(sequence, upto=num_computed)
        return None

    def end_of_prompt(self, sequence: Sequence, chunk: Chunk) -> End | None:
        """How a sequence that asks for no output ends by a chunk that was computed."""
        num_computed = chunk.start - sequence.num_prefix_tokens + len(chunk.tokens)
        if num_computed < sequence.num_prompt:
            return None
        self._recovery.suspects.pop(sequence, None)
        return End(FinishReason.LENGTH)

    def _append(
        self, sequence: Sequence, chunk: Chunk, sampled: Sampled, end: End | None, num_computed: int
    ) -> End | None:
        """Take one token, sampled after the first ``num_computed``; returns how the sequence ends
        by it. Those may be fewer than the sequence's: the next step may be in flight."""
        if self._recovery.suspects:
            self._recovery.suspects.pop(sequence, None)
        if not sampled.finite:
            return self._not_finite(sequence, chunk)
        size = self._memory.block_size
        num_full = (sequence.num_prefix_tokens % size + num_computed) // size
        if num_full > sequence.num_remembered and sequence.state is State.RUNNING:
            self._memory.reuse.remember(sequence, upto=num_computed)
        waiting = self._waiting
        if sequence.background:
            waiting = self._background.waiting
        waiting.charge(sequence.tenant, 1)
        sequence.tokens.append(sampled.token_id)
        if sequence.agreed:
            counts = zip(sequence.agreed, sampled.agreed, strict=True)
            sequence.agreed = [count + agrees for count, agrees in counts]
        return end

    def _not_finite(self, sequence: Sequence, chunk: Chunk) -> End:
        self._memory.reuse.forget(sequence, chunk.block_table)
        for row in sequence.ensemble:  # it is not known which of them it was
            self._memory.reuse.forget(row, row.block_table)
        error = "the model produced non-finite logits for this request"
        return End(FinishReason.ERROR, error=error)
