"""Sizes the scheduler works with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes. ``num_blocks`` counts the null block; lengths are in tokens.

    ``max_staged`` bounds the prefixes in host memory between store and pool.
    """

    num_blocks: int
    block_size: int = 16
    max_tokens_per_step: int = 1024
    max_prefill_chunk: int = 512
    max_running: int = 64
    max_staged: int = 16

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

    def max_tokens_for(self, prefix_tokens: int) -> int:
        """Most real tokens (prompt and output) one sequence under a prefix of ``prefix_tokens``
        can have with the whole pool to itself; 0 or less means that the prefix does not fit.

        The last output token is never written, hence the one on top.
        """
        held = -(-prefix_tokens // self.block_size)
        own = (self.num_usable_blocks - held) * self.block_size
        return own - prefix_tokens % self.block_size + 1 if own > 0 else 0
