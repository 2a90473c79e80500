"""A step while it is drawn up."""

from dataclasses import dataclass, field

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.residency import Entry
from prefixd.server.engine.step import BlockCopy, Chunk, CompileChunk, Save, Step


@dataclass(slots=True)
class StepBuilder:
    """``budget`` tokens are left of the step; no sequence takes more than ``chunk`` of them,
    and all compiles together take no more."""

    budget: int
    chunk: int
    compiled: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    compiles: list[CompileChunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    fetches: list[PrefixKey] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)

    def share(self, wanted: int) -> int:
        """How many of ``wanted`` tokens one part may run."""
        return min(wanted, self.budget, self.chunk)

    def run(self, chunk: Chunk) -> None:
        """Take up a part of a sequence."""
        self.chunks.append(chunk)
        self.budget -= len(chunk.tokens)

    def compile(self, entry: Entry) -> int:
        """Take up the next part of a compile if there is room; returns how many tokens."""
        size = min(self.budget, self.chunk - self.compiled, entry.num_tokens - entry.num_compiled)
        if not size:
            return 0
        assert entry.payload is not None
        self.compiles.append(
            CompileChunk(
                key=entry.key,
                payload=entry.payload,
                start=entry.num_compiled,
                stop=entry.num_compiled + size,
                block_table=tuple(entry.blocks),
            )
        )
        self.budget -= size
        self.compiled += size
        return size

    def step(self) -> Step:
        """The step as it stands."""
        return Step(
            chunks=tuple(self.chunks),
            compiles=tuple(self.compiles),
            copies=tuple(self.copies),
            fresh=tuple(self.fresh),
            fetches=tuple(self.fetches),
            saves=tuple(self.saves),
        )
