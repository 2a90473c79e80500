"""Speculation: proposed tokens are verified in the step of the sequence's next token.

They take only what no real token of the step needs: the rest of its budget, and free blocks. What
a sequence holds and has computed afterwards is as if each accepted token had had its own step.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

from prefixd.server.engine.draft_plan import Candidate, is_worth_waiting, plan_drafts
from prefixd.server.engine.lookup import MAX_DRAFTS, Lookup
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.prefix_loader import PrefixLoader
from prefixd.server.engine.recovery import Recovery
from prefixd.server.engine.row_costs import RowCosts
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Chunk, Draft, Step


class Speculation:
    """Adds drafts to the decode rows of a step where they pay; ``costs`` says where."""

    def __init__(
        self,
        *,
        enabled: bool,
        memory: Memory,
        prefix_loader: PrefixLoader,
        recovery: Recovery,
        uniform: Callable[[int, int], float],
    ) -> None:
        """``uniform(seed, index)`` draws the number in [0, 1) that selects output ``index``."""
        self.costs = RowCosts()
        self._enabled = enabled
        self._memory = memory
        self._prefix_loader = prefix_loader
        self._backoff = recovery.backoff
        self._uniform = uniform

    def observe(self, step: Step, seconds: float) -> None:
        """Take in how long a step took. With background parts next to others it says nothing."""
        if self._enabled and not (step.num_foreground and step.background_tokens):
            self.costs.observe(step, seconds=seconds)

    def add_drafts(self, step: Step, decoding: Items[Sequence]) -> None:
        """Add drafts to the first chunks of ``step``, those of ``decoding``, after all else."""
        rows = len(decoding)
        if not (self._enabled and decoding and self._backoff.max_drafts and step.budget > 0):
            return
        if self.costs.needs_plain(rows):
            return
        proposals = []
        for sequence, chunk in zip(decoding, step.chunks, strict=False):
            if sequence.speculates and not chunk.is_pending:
                sequence.lookup = sequence.lookup or Lookup()
                probability = sequence.lookup.find(sequence.tokens)
                if probability > 0.0:
                    candidate = Candidate(probability, self._limit(step, sequence))
                    proposals.append((candidate, sequence, chunk))
        counts = plan_drafts(
            [candidate for candidate, _, _ in proposals],
            rows=rows,
            budget=step.budget,
            slowdown=partial(self.costs.slowdown, rows),
        )
        for (_, sequence, chunk), count in zip(proposals, counts, strict=True):
            if count:
                # Those before it have taken blocks.
                self._add_draft(step, sequence, chunk, min(count, self._limit(step, sequence)))

    def waits(self, step: Step, sequence: Sequence, *, rows: int) -> bool:
        """Whether a sequence, one of ``rows`` that run, waits for its pending token: while it
        verifies a draft, and where a draft after that token is worth a step without it."""
        if sequence.verifies:
            return True
        if not (self._enabled and sequence.speculates) or self.costs.needs_plain(rows):
            return False
        limit = self._limit(step, sequence) - 1
        if limit < 1:
            return False
        sequence.lookup = sequence.lookup or Lookup()
        candidate = Candidate(sequence.lookup.find(sequence.tokens), limit)
        slowdown = partial(self.costs.slowdown, rows)
        return is_worth_waiting(candidate, rows=rows, slowdown=slowdown)

    def _limit(self, step: Step, sequence: Sequence) -> int:
        """The most drafts that the sequence may have."""
        pool, size = self._memory.pool, self._memory.block_size
        num_positions = sequence.num_prefix_tokens + len(sequence.tokens)
        num_free = max(0, pool.num_free - self._prefix_loader.promised)
        stop = sequence.request.stop
        return min(
            step.budget,
            self._backoff.max_drafts,
            MAX_DRAFTS,
            stop.max_tokens - sequence.num_output - 1,  # the last draft is followed by a token
            (len(sequence.block_table) + num_free) * size - num_positions,
        )

    def _add_draft(self, step: Step, sequence: Sequence, chunk: Chunk, count: int) -> None:
        if count < 1 or sequence.lookup is None:
            return
        tokens = sequence.lookup.propose(sequence.tokens, count)
        pool = self._memory.pool
        num_positions = sequence.num_prefix_tokens + len(sequence.tokens)
        num_lacking = self._blocks_for(num_positions + len(tokens)) - len(sequence.block_table)
        if num_lacking > 0:
            blocks = pool.allocate(num_lacking)
            step.fresh += blocks
            sequence.block_table += blocks
            chunk.block_table = tuple(sequence.block_table)
        step.budget -= len(tokens)
        chunk.draft = self._draft(sequence, tokens)
        sequence.verifies = True

    def _draft(self, sequence: Sequence, tokens: list[int]) -> Draft:
        num_output = sequence.num_output
        is_drawn = sequence.request.sampling.temperature > 0
        indices = range(num_output + 1, num_output + 1 + len(tokens))
        return Draft(
            tokens,
            [self._uniform(sequence.seed, index) if is_drawn else 0.0 for index in indices],
            num_banned=max(0, sequence.request.stop.min_tokens - num_output - 1),
        )

    def verified(self, sequence: Sequence, chunk: Chunk, *, num_new: int, finite: bool) -> None:
        """After a sequence that goes on has taken ``num_new`` tokens: count what was accepted, and
        release the blocks that only drafts needed, if it still runs.

        With ``finite`` False the sequence speculates no more: a draft may have caused what was not
        finite, so its next step has none.
        """
        if chunk.draft is None or sequence.lookup is None:
            return
        sequence.speculates = sequence.speculates and finite
        accepted = max(0, num_new - 1)
        sequence.lookup.observe(proposed=chunk.num_drafts, accepted=accepted)
        needed = self._blocks_for(sequence.num_prefix_tokens + len(sequence.tokens))
        self._memory.pool.release(sequence.block_table[needed:])
        del sequence.block_table[needed:]

    def _blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self._memory.block_size)
