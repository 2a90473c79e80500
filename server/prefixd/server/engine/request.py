"""What admission passes to the engine, and what the engine reports back: plain data.

A request is parsed once into these types: the prefix is a digest and no longer a name, the prompt
is token ids, and a request that can never fit has already been refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from prefixd.server.engine.constraint import Constraint
from prefixd.server.engine.inputs import InputRun

Ranges = tuple[tuple[int, int], ...]
"""Ranges of virtual tokens, each from its first to behind its last, one after another."""


class Composition(NamedTuple):
    """What a stack or a blend is made of: the digests of its members, and of a blend the weight of
    each. ``kind`` is ``stack`` (in order) or ``blend`` (the order says nothing: by digest)."""

    kind: str
    digests: tuple[str, ...]
    weights: tuple[float, ...] = ()


class PrefixKey(NamedTuple):
    """Identity of one prefix in the pool: never a name, so a re-upload cannot hit old KV.

    ``rows`` are those of its virtual tokens that are meant, one range after another; without any,
    all of them. A tuple, because it is a dictionary key in every step, and tuples hash without
    Python code. Of several prefixes in one, ``composition`` says which, and ``digest`` is its own.
    """

    tenant: str
    digest: str
    rows: Ranges = ()
    composition: Composition | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the stored artifacts that it is made from."""
        return (self.digest,) if self.composition is None else self.composition.digests

    @property
    def content(self) -> str:
        """Digest and rows: what is in the pool, apart from whose it is."""
        if not self.rows:
            return self.digest
        return f"{self.digest}[{','.join(f'{start}:{stop}' for start, stop in self.rows)}]"


@dataclass(frozen=True, slots=True)
class PrefixHandle:
    """A resolved prefix: its identity and its virtual tokens. A ``gated`` one takes no
    positions of its sequences."""

    key: PrefixKey
    num_tokens: int
    gated: bool = False

    @property
    def num_positions(self) -> int:
        """Positions that it takes at the start of each sequence."""
        return 0 if self.gated else self.num_tokens


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Names and meaning as in vLLM and the OpenAI API.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 are off.
    ``top_logprobs`` None asks for no log-probabilities, 0 for the chosen token's alone.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must see the tokens so far: a penalty is set."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_filtered(self) -> bool:
        """Whether top_k, top_p or min_p may cut tokens."""
        return bool(self.top_k) or self.top_p < 1 or bool(self.min_p)


@dataclass(frozen=True, slots=True)
class StopParams:
    """When a sequence ends. ``token_ids`` already holds the model's own end-of-sequence ids,
    unless the request set ``ignore_eos``. With ``max_tokens`` 0 it ends with its prompt."""

    max_tokens: int
    min_tokens: int = 0
    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    include_stop_string: bool = False


@dataclass(frozen=True, slots=True)
class Scoring:
    """Which tokens of a prompt are scored: those from place ``start`` on, 1 at least since nothing
    comes before the first; with each of them the ``top`` likeliest tokens there."""

    start: int
    top: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """A further row of an ensemble: a prompt of its own under a prefix of its own."""

    prompt: tuple[int, ...]
    prefix: PrefixHandle | None
    inputs: tuple[InputRun, ...] = ()


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """One request that fits: ``n`` sequences of the same prompt under the same prefix.

    ``expected_tokens`` is the output length that the queue assumes where the request set none
    (None: ``stop.max_tokens``). ``max_resident_tokens`` caps the virtual tokens that the tenant's
    prefixes may hold in the pool at a time (None: no cap); admission has refused a prefix that is
    longer than that by itself. ``weight`` is the tenant's share against other tenants' (2 gets
    twice as much), ``priority`` orders the tenant's own requests (lower runs first, as in vLLM),
    ``timeout_s`` is how long after its submission the request ends, finished or not, and
    ``kv_reuse`` says whether it may share KV of equal tokens with other requests of its tenant
    under the same prefix, and ``speculate`` whether several tokens of it may be verified in one
    step. ``constraint`` says which tokens may follow those before them (``mask_worker``).
    Each of the sequences has ``num_side_blocks`` blocks in addition to its block table, for KV of
    something other than its tokens; its KV is then not reused.
    ``inputs``, in order, are embeddings in place of the prompt's placeholders (``inputs``).
    ``source`` is the input of an encoder-decoder's encoder, whose KV is in the side blocks;
    ``prompt`` is then what the decoder begins with. ``shown_special`` are special tokens that are
    part of the text of outputs.
    ``scoring`` asks for the log-probabilities of prompt tokens, once for all ``n`` sequences: the
    first of them computes those tokens, and shares no KV behind the first scored one.
    ``background``: it is of the lowest class, which takes what the other requests leave idle.
    With ``members`` it is an ensemble: each of the ``n`` outputs has one sequence for the prompt,
    and one for each member, and each of its tokens is chosen from what all of them predict
    (``Chunk.ensemble``). It has no ``scoring`` and no ``source`` then, is not of the background
    class, and has at least one token of output.
    """

    request_id: str
    tenant: str
    prompt: tuple[int, ...]
    prefix: PrefixHandle | None
    sampling: SamplingParams
    stop: StopParams
    n: int = 1
    expected_tokens: int | None = None
    max_resident_tokens: int | None = None
    weight: float = 1.0
    priority: int = 0
    timeout_s: float | None = None
    kv_reuse: bool = True
    speculate: bool = True
    constraint: Constraint | None = None
    num_side_blocks: int = 0
    inputs: tuple[InputRun, ...] = ()
    source: tuple[int, ...] = ()
    shown_special: frozenset[str] = frozenset()
    scoring: Scoring | None = None
    background: bool = False
    members: tuple[Member, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the caller's prompt, which are counted and charged; those of each row."""
        own = len(self.source or self.prompt)
        return own + sum(len(member.prompt) for member in self.members)

    @property
    def num_rows(self) -> int:
        """Sequences that each of its outputs takes."""
        return 1 + len(self.members)

    def of_rows(self) -> "tuple[AdmittedRequest, ...]":
        """A request for each row: for an ensemble this one, and one without members for each."""
        rows = (
            replace(self, prompt=m.prompt, prefix=m.prefix, inputs=m.inputs, members=())
            for m in self.members
        )
        return (self, *rows)


class FinishReason(StrEnum):
    """Why a sequence ended; the first two are OpenAI's words.

    TIMEOUT: its own ``timeout_s`` passed. SHED: it was dropped, unstarted, under overload.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"
    SHED = "shed"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token id with its natural-log probability under the unmodified distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The sampled token of one position of the output, and the likeliest ones there.

    ``previous`` is the token whose text comes before it, on which its own text depends (None at the
    start of a text); ``offset`` is the number of characters of the answer before it.
    """

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]
    previous: int | None
    offset: int


@dataclass(slots=True)  # a frozen one takes twice as long to make
class TokenEvent:
    """New output of sequence ``index``: text that is final (stop strings already held back), the
    tokens sampled since the last event (possibly none), and the log-probabilities of the positions
    whose place in the text is final. At its end a sequence has sent those of all its tokens."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()


class PromptScore(NamedTuple):
    """The log-probability of one prompt token after those before it, the number of tokens that are
    likelier there, and the likeliest ones."""

    logprob: float
    num_likelier: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreEvent:
    """Scores of consecutive prompt tokens of sequence ``index``, from ``place`` on. All of them
    come before its first TokenEvent, in order."""

    index: int
    place: int
    scores: tuple[PromptScore, ...]


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The last event of sequence ``index``.

    ``error`` is a one-line message for the caller, set when and only when ``reason`` is ERROR,
    TIMEOUT or SHED; ``error_code`` is its machine-readable cause, where the prefix source gave one
    (see PrefixUnavailable). ``stop`` is the stop string or token id that ended it;
    ``cached_tokens`` of its prompt were not computed but shared (KV reuse); ``queue_s`` is how many
    seconds it waited before it ran (None: it never did); ``retry_after`` is in seconds, set with
    SHED. ``agreed`` counts, for each row of an ensemble, the tokens of the output that the row
    alone would have chosen greedily.
    """

    index: int
    reason: FinishReason
    completion_tokens: int
    stop: str | int | None = None
    error: str | None = None
    error_code: str | None = None
    cached_tokens: int = 0
    queue_s: float | None = None
    retry_after: float | None = None
    agreed: tuple[int, ...] = ()


Event = TokenEvent | ScoreEvent | FinishEvent


class QueueFull(Exception):
    """The engine accepts no further request for now. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
