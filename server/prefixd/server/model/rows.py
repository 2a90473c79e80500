"""The parts of a pass."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefixd.server.engine.step import GatedRows, Source


@dataclass(slots=True)
class Row:
    """The part of a pass that belongs to one sequence or compiling prefix: ``length`` positions
    from ``start``, at ``offset`` in the flat tokens. The first ``num_prefix_tokens`` positions are
    those of a prefix, which other rows may have too. ``side_blocks`` hold its state, if any. Its
    tokens attend to the rows of ``gated`` too.

    In an encoder-decoder ``source`` is its input, behind the soft prompt that is in ``gated``, and
    ``side_blocks`` hold the KV of both.
    """

    offset: int
    start: int
    length: int
    block_table: Sequence[int]
    num_prefix_tokens: int = 0
    side_blocks: Sequence[int] = ()
    gated: GatedRows | None = None
    source: Source | None = None

    @property
    def end(self) -> int:
        """Positions in the pool after this pass; the last token sees all of them."""
        return self.start + self.length
