"""Sizes and time limits of the scheduler."""

from collections.abc import Iterable
from dataclasses import dataclass

from prefixd.server.engine.request import PrefixHandle


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes. ``num_blocks`` counts the null block; lengths are in tokens, times in seconds.

    - ``max_tokens_per_step``, ``max_prefill_chunk``: tokens of one step, and of one sequence in it.
    - ``max_scored``: prompt tokens that one step scores, as the logits before each are kept.
    - ``max_token_gap_s``: running streams wait no longer for their next token because prompts and
      prefixes are computed with it: these run in smaller parts (None: in the largest).
    - ``max_staged``: prefixes that are loading (fetching, staged or compiling) at a time.
    - ``max_resident_tokens``: virtual tokens of all prefixes in the pool (None: the whole pool).
    - ``host_tokens``: virtual tokens of compiled prefixes kept in host memory for a quick return.
    - ``max_prefix_wait_s``: a sequence that waits longer for its prefix alone forces it in.
    - ``max_tenant_wait_s``: a tenant of which nothing runs waits no longer before another tenant's
      sequence is preempted for it (None: until one ends).
    - ``failed_prefix_memory_s``: how long a prefix that failed to load is not fetched again.
    - ``max_waiting_tokens``: prompt and output tokens that may wait (None: no bound).
    - ``max_queue_wait_s``: a sequence that has not started by then is shed (None: never).
    - ``speculate``: sequences may have their next tokens proposed from their own text.
    - ``state_blocks``: side blocks of each sequence and each prefix, for the state of layers that
      have one instead of KV. With any, KV is not reused and nothing is proposed: a state is that of
      one position, and cannot be taken back.
    """

    num_blocks: int
    block_size: int = 16
    max_tokens_per_step: int = 1024
    max_prefill_chunk: int = 512
    max_scored: int = 512
    max_token_gap_s: float | None = None
    max_running: int = 64
    max_staged: int = 16
    max_resident_tokens: int | None = None
    host_tokens: int = 0
    max_prefix_wait_s: float = 0.5
    max_tenant_wait_s: float | None = 1.0
    failed_prefix_memory_s: float = 5.0
    max_waiting_tokens: int | None = None
    max_queue_wait_s: float | None = None
    speculate: bool = False
    state_blocks: int = 0

    def __post_init__(self) -> None:
        if min(self.block_size, self.max_prefill_chunk, self.max_running, self.max_staged) < 1:
            raise ValueError(
                "block_size, max_prefill_chunk, max_running and max_staged must be at least 1"
            )
        if self.max_tokens_per_step < self.max_running:
            raise ValueError(
                f"max_tokens_per_step ({self.max_tokens_per_step}) must be at least max_running "
                f"({self.max_running}): each running sequence decodes one token a step"
            )

    @property
    def num_usable_blocks(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` positions."""
        return -(-num_tokens // self.block_size)

    def prefix_blocks(self, num_tokens: int) -> int:
        """Blocks of a prefix of ``num_tokens``, side blocks included; 0 for none."""
        return self.blocks_needed(num_tokens) + self.state_blocks if num_tokens else 0

    def max_tokens_for(
        self, prefix_tokens: int, *, num_side_blocks: int = 0, gated: bool = False
    ) -> int:
        """Most real tokens (prompt and output) that one sequence under a prefix of
        ``prefix_tokens``, which may be ``gated``, can have in an otherwise empty pool; 0 or less:
        the prefix does not fit. ``num_side_blocks`` are those that the request needs itself.

        The KV of the last output token is never written, so one more token fits.
        """
        if self.max_resident_tokens is not None and prefix_tokens > self.max_resident_tokens:
            return 0
        side = self.state_blocks + num_side_blocks
        own = self.num_usable_blocks - self.prefix_blocks(prefix_tokens) - side
        own *= self.block_size
        shared = 0 if gated else prefix_tokens % self.block_size
        return own - shared + 1 if own > 0 else 0

    def blocks_together(
        self, rows: Iterable[tuple[PrefixHandle | None, int]], *, num_side_blocks: int = 0
    ) -> int:
        """Blocks of sequences that run at the same time, each under its prefix with a number of
        real tokens; each prefix counts once. ``num_side_blocks`` are those of each sequence."""
        blocks, prefixes = 0, dict[PrefixHandle, int]()
        for prefix, num_tokens in rows:
            before = 0 if prefix is None else prefix.num_positions
            blocks += self.blocks_needed(before + max(0, num_tokens - 1))
            blocks += self.state_blocks + num_side_blocks - before // self.block_size
            if prefix is not None:
                prefixes[prefix] = self.prefix_blocks(prefix.num_tokens)
        return blocks + sum(prefixes.values())
