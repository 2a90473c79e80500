"""Data contracts between scheduler and runner: plain data, no torch.

``scheduler.schedule() -> Step``, ``runner.submit(step)``, ``runner.collect() -> StepOutput``,
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

A sequence and a prefix may have side blocks: blocks of the same pool that are in no block table.
The first ``SchedulerConfig.state_blocks`` hold the state of layers that have one instead of KV,
after all positions so far: zeros before the first. A chunk reads the state after its ``start`` and
leaves that after its end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prefixd.server.engine.inputs import InputPart
from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.request import PrefixKey, PromptScore, SamplingParams, TokenLogprob

NULL_BLOCK = 0
"""Block 0 is never allocated and always holds zeros: padding reads it."""

PENDING = -1
"""In place of a token that the step before samples for the same sequence, and that was not
collected yet: the runner reads it on the device. One of non-finite logits may have any id of the
vocabulary."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed to follow the last one of a chunk, which the same pass verifies.

    ``uniforms`` are the draws in [0, 1) after each of them; the ids that the chunk bans are banned
    after the first ``num_banned`` of them too.
    """

    tokens: Sequence[int]
    uniforms: Sequence[float]
    num_banned: int = 0


class Targets(NamedTuple):
    """Prompt tokens to score: ``tokens[i]`` follows the token ``offset + i`` of a chunk. ``top``
    is how many of the likeliest tokens are wanted with each."""

    offset: int
    tokens: Sequence[int]
    top: int


@dataclass(frozen=True, slots=True)
class GatedRows:
    """A gated prefix (an adaption prompt): ``num_tokens`` rows of keys and values in blocks of its
    own. In the layers from ``first_layer`` on, every token of a sequence attends to all of them
    too, with a softmax of their own; the values hold the gate."""

    block_table: Sequence[int]
    num_tokens: int
    first_layer: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """The input of the encoder, for a sequence of an encoder-decoder: ``num_tokens`` positions, of
    a soft prompt that is ``gated`` and of ``token_ids`` behind it. The keys and values that
    the decoder reads of them are in the first positions of the sequence's side blocks, which a step
    writes that has the ids; later chunks have none."""

    num_tokens: int
    token_ids: Sequence[int] = ()


@dataclass(slots=True)  # a frozen one takes twice as long to make, and a step makes many
class Chunk:
    """Consecutive tokens of one sequence to run through the model in this step.

    ``sampling`` is set when the last token's logits are to be sampled. ``uniform`` is then the
    draw in [0, 1) that selects the token (0 for a greedy one), ``history`` all tokens so far (empty
    unless penalties need them; the first ``num_prompt_tokens`` are the prompt) and ``banned`` the
    ids that must not be sampled yet. ``mask`` is the bit mask (``constraint``) of those that may be
    (None: all). The tokens of ``draft`` run after ``tokens``, and the logits
    after each of them are sampled too. The first ``num_prefix_tokens`` positions are the prefix's,
    unless it is ``gated``.

    The last of ``tokens`` may be PENDING. Then ``history`` is without it, and there is no draft.
    ``side_blocks`` are the sequence's alone; there is no draft either where they hold a state.
    Tokens that are placeholders have their embeddings in ``inputs``, in order. ``targets`` are the
    prompt tokens to score, None without any; the score of a placeholder means nothing.

    ``ensemble`` is the ``seq_id`` of the first row of an ensemble. All its rows are sampled in one
    step, in consecutive chunks: one token, by the settings of the first, from the average of their
    log-probabilities (``StepOutput.sampled`` has it for the first row).
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
    draft: Draft | None = None
    num_prefix_tokens: int = 0
    side_blocks: Sequence[int] = ()
    inputs: Sequence[InputPart] = ()
    gated: GatedRows | None = None
    source: Source | None = None
    mask: bytes | None = None
    targets: Targets | None = None
    ensemble: int | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether it has a token of its own in ``StepOutput.sampled``."""
        return self.sampling is not None and self.ensemble in {None, self.seq_id}

    @property
    def is_pending(self) -> bool:
        """Whether the last token is still to come."""
        return self.tokens[-1] == PENDING

    @property
    def num_drafts(self) -> int:
        """Proposed tokens."""
        return 0 if self.draft is None else len(self.draft.tokens)

    @property
    def num_encoded(self) -> int:
        """Positions of the encoder that run before the tokens."""
        source = self.source
        return source.num_tokens if source is not None and source.token_ids else 0

    @property
    def length(self) -> int:
        """Tokens that run, proposed ones included."""
        return len(self.tokens) + self.num_drafts

    def positions(self) -> "list[Chunk]":
        """What is sampled: this chunk after its last token, and a copy for each proposed token with
        the settings that hold after it."""
        draft = self.draft
        if draft is None:
            return [self]
        return [self] + [
            Chunk(
                self.seq_id,
                self.tokens,
                self.start,
                self.block_table,
                sampling=self.sampling,
                uniform=uniform,
                history=(*self.history, *draft.tokens[:count]) if self.history else (),
                num_prompt_tokens=self.num_prompt_tokens,
                banned=self.banned if count <= draft.num_banned else (),
            )
            for count, uniform in enumerate(draft.uniforms, start=1)
        ]

    def verified(self, sampled: "Sequence[Sampled]") -> "Sequence[Sampled]":
        """Of the tokens that were ``sampled`` at each position those that follow the chunk: up to
        the first that differs from the proposed one, or is not finite."""
        drafts = () if self.draft is None else self.draft.tokens
        for index, proposed in enumerate(drafts):
            if not sampled[index].finite or sampled[index].token_id != proposed:
                return sampled[: index + 1]
        return sampled


@dataclass(frozen=True, slots=True)
class CompileChunk:
    """Virtual tokens ``start .. stop`` of a prefix to turn into KV in this step, from its staged
    payload: run through the model (soft prompt, text) or copied (KV prefix)."""

    key: PrefixKey
    payload: StagedPrefix
    start: int
    stop: int
    block_table: Sequence[int]
    side_blocks: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one block to another: the tail of a prefix, and its state, become a sequence's own."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Save:
    """Read a compiled prefix back to host memory: its blocks are free again, and may already be
    among this step's ``fresh``. ``gated_from`` is the payload's."""

    key: PrefixKey
    num_tokens: int
    block_table: Sequence[int]
    side_blocks: Sequence[int] = ()
    gated_from: int | None = None


@dataclass(slots=True)
class Step:
    """One forward pass over any mix of decode rows, prefill chunks and prefix compiles.

    The scheduler fills it, within ``budget``: the tokens that may still be added. ``max_chunk`` is
    the most tokens of one sequence, and of all compiles together, and ``max_scored`` the prompt
    tokens that may still be scored: a chunk has one more where none may.

    The runner performs, in this order: ``saves``, zero ``fresh``, ``copies``, then ``chunks`` and
    ``compiles`` in one pass. ``fetches`` is for the engine: prefixes to load from the store, off
    the hot path. ``masked`` are the ids of sequences whose tokens so far decide what may be sampled
    (see ``ModelRunner.complete``). The chunks from ``num_foreground`` on are of the background
    class (None: it has none); ``background_tokens`` are theirs and those of its compiles.
    """

    chunks: list[Chunk] = field(default_factory=list)
    compiles: list[CompileChunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    fetches: list[PrefixKey] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    masks: Callable[[], Mapping[int, bytes]] | None = None
    budget: int = 0
    max_chunk: int = 0
    max_scored: int = 0
    num_foreground: int | None = None
    background_tokens: int = 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything for the runner to do."""
        return bool(self.chunks or self.compiles or self.fresh or self.saves)

    def join_masks(self) -> None:
        """Wait for the masks of the masked rows, if they were not set yet. A row without one is
        of a sequence that is to end: what is sampled for it does not count."""
        if self.masks is not None:
            masks, self.masks = self.masks(), None
            for chunk in self.chunks:
                chunk.mask = masks.get(chunk.seq_id)

    def limit(self, num_tokens: int) -> None:
        """Let at most ``num_tokens`` more be added."""
        self.budget = min(self.budget, num_tokens)
        self.max_chunk = min(self.max_chunk, num_tokens)

    @property
    def num_parts(self) -> int:
        """Rows of the forward pass, those of an ensemble counted as one."""
        parts = {c.seq_id if c.ensemble is None else c.ensemble for c in self.chunks}
        return len(parts) + len(self.compiles)

    @property
    def num_tokens(self) -> int:
        """Tokens this step runs, virtual and proposed ones included, and those of encoders."""
        return sum(c.length for c in self.chunks) + self.num_encoded + self.num_compiled

    @property
    def num_encoded(self) -> int:
        """Positions of encoders that this step runs."""
        return sum(c.num_encoded for c in self.chunks if c.source is not None)

    @property
    def num_drafts(self) -> int:
        """Proposed tokens this step verifies."""
        return sum(c.num_drafts for c in self.chunks if c.draft is not None)

    @property
    def is_smallest(self) -> bool:
        """Whether it is a part alone, with nothing that could be left out."""
        return self.num_parts <= 1 and not self.num_drafts

    @property
    def num_compiled(self) -> int:
        """Virtual tokens this step compiles."""
        return sum(part.stop - part.start for part in self.compiles)

    @property
    def distinct_prefixes(self) -> int:
        """Different prefixes carried by the rows of this one pass (the bare base not counted)."""
        return len({c.prefix for c in self.chunks if c.prefix is not None})


@dataclass(slots=True)
class Sampled:
    """One sampled token. ``finite`` is False when the row's logits held NaN or +inf: that row
    failed, and no other. ``agreed`` says for each row of an ensemble whether the token is the
    likeliest one of that row alone."""

    token_id: int
    finite: bool = True
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    agreed: tuple[bool, ...] = ()


class ThreadUse(NamedTuple):
    """Threads that computed at the end of a step; how often their number has changed since the
    start; and in how many steps one of them lost its core for a while."""

    threads: int
    num_changes: int
    late_steps: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """New tokens by sequence id, for the chunks with ``sampling``, and the saved prefixes.
    ``scored`` are the scores of the ``targets``, by sequence id; None where logits held NaN or
    +inf: that sequence failed, and no other.

    There is one new token, and one more for each proposed token that was accepted (see
    ``Chunk.verified``). ``thread_use`` is None where the runner does not count threads.
    """

    sampled: dict[int, Sequence[Sampled]]
    saved: dict[PrefixKey, StagedPrefix] = field(default_factory=dict)
    thread_use: ThreadUse | None = None
    scored: Mapping[int, Sequence[PromptScore] | None] = field(default_factory=dict)
