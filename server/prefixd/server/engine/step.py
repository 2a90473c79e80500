"""Data contracts between scheduler and runner: plain data, no torch.

``scheduler.schedule() -> Step``, ``runner.run(step) -> StepOutput``,
``scheduler.update(step, output)``.

Positions count virtual tokens: token ``i`` of a sequence under a prefix of P virtual tokens sits
at position ``P + i``, in slot ``position % block_size`` of the block
``block_table[position // block_size]``.

::

    prefix of 20 virtual tokens, block size 16        block table of a sequence under it
    +------ block 7 ------+ +--- block 9 ---+         [7, 31, 32]
    | 0 ............... 15 | | 16 .. 19      |          |   |
    +---------------------+ +---------------+          |   +-- own: copy of 16..19, then its tokens
                                                       +------ shared, read-only
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prefixd.server.engine.request import PrefixKey, SamplingParams, TokenLogprob

NULL_BLOCK = 0
"""Block 0 is never handed out and holds zeros for ever: what padding reads."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run through the model in this step.

    ``sampling`` is set when the last token's logits are to be sampled; ``uniform`` is then the
    draw in [0, 1) that decides, ``history`` all tokens so far (empty unless penalties ask; the
    first ``num_prompt_tokens`` are the prompt) and ``banned`` ids that must not come yet.
    """

    seq_id: int
    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    prefix: PrefixKey | None = None
    sampling: SamplingParams | None = None
    uniform: float = 0.0
    history: Sequence[int] = ()
    num_prompt_tokens: int = 0
    banned: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class CompileChunk:
    """Virtual tokens ``start .. stop`` of a prefix to turn into KV in this step, from its staged
    payload: run through the model (soft prompt, text) or copied (KV prefix)."""

    key: PrefixKey
    payload: "StagedPrefix"
    start: int
    stop: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the KV of one block to another: the tail of a prefix becomes a sequence's own."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Save:
    """Read a compiled prefix back to host memory: its blocks were given up, and may already be
    among this step's ``fresh``."""

    key: PrefixKey
    num_tokens: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over any mix of decode rows, prefill chunks and prefix compiles.

    The runner performs, in this order: ``saves``, zero ``fresh``, ``copies``, then ``chunks`` and
    ``compiles`` in one pass. ``fetches`` is for the engine: prefixes to bring from the store, off
    the hot path.
    """

    chunks: tuple[Chunk, ...] = ()
    compiles: tuple[CompileChunk, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    fresh: tuple[int, ...] = ()
    fetches: tuple[PrefixKey, ...] = ()
    saves: tuple[Save, ...] = ()

    @property
    def has_work(self) -> bool:
        """Whether the runner has anything to do."""
        return bool(self.chunks or self.compiles or self.fresh or self.saves)

    @property
    def num_parts(self) -> int:
        """Rows of the forward pass."""
        return len(self.chunks) + len(self.compiles)

    @property
    def num_tokens(self) -> int:
        """Tokens this step runs, virtual ones included."""
        return sum(len(c.tokens) for c in self.chunks) + sum(
            c.stop - c.start for c in self.compiles
        )

    @property
    def distinct_prefixes(self) -> int:
        """Different prefixes carried by the rows of this one pass (the bare base not counted)."""
        return len({c.prefix for c in self.chunks if c.prefix is not None})


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token. ``finite`` is False when the row's logits held NaN or +inf: the row
    failed, and alone."""

    token_id: int
    finite: bool = True
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Sampled tokens by sequence id, for the chunks that asked for one, and what was saved."""

    sampled: dict[int, Sampled]
    saved: "dict[PrefixKey, StagedPrefix]" = field(default_factory=dict)


class StagedPrefix(Protocol):
    """A prefix fetched, verified and validated, in host memory, ready to compile.

    The engine only counts its positions; what it holds is between the source and the runner.
    """

    @property
    def num_tokens(self) -> int: ...


class OutOfMemory(Exception):
    """The device had no room for a step; smaller ones may go through."""


STORAGE_UNAVAILABLE = "storage_unavailable"
"""The code of a failure that a retry may cure: the store or the catalog cannot be reached now."""


class PrefixUnavailable(Exception):
    """A prefix failed to load. The message is for the tenant whose request needs it; ``code`` is a
    machine-readable cause, or None for one that needs no handling of its own."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class PrefixSource(Protocol):
    """Brings a prefix from the store. Blocking; called off the engine's thread."""

    def fetch(self, key: PrefixKey) -> StagedPrefix:
        """Raise PrefixUnavailable when it fails to load."""
        ...


class ModelRunner(Protocol):
    """The device. ``run`` is called by one thread only."""

    def run(self, step: Step) -> StepOutput:
        """Raises OutOfMemory, or anything else when the pass fails."""
        ...


class Detokenizer(Protocol):
    """Turns one sequence's growing token ids into text, incrementally."""

    def push(self, token_id: int) -> str:
        """Text that became final with this token (often empty in the middle of a character)."""
        ...

    def flush(self) -> str:
        """What is still held back, at the end."""
        ...
