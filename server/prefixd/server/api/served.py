"""The served base model for the API: names, limits and a tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from prefixd.server.api.answers.formats import CallFormat
from prefixd.server.engine.detokenizer import Detokenizer
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.composition import encoded_runs
from prefixd.store.artifact.kinds import TextRole
from prefixd.store.errors import ArtifactRefused


class Tokenizer(Protocol):
    """Text to token ids and back. Called from worker threads."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, by default with the model's opening tokens, never with closing
        ones."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of special tokens by name, such as ``bos_token``, as chat templates use
        them."""
        ...

    @property
    def closing(self) -> list[int]:
        """The tokens that end the input of an encoder."""
        ...

    def encode_prefix(self, text: str) -> list[int]:
        """Token ids of a text prefix: the opening tokens once, also when the text has them."""
        ...

    def encode_system(self, text: str) -> list[int]:
        """Token ids with which every conversation begins whose system turn begins with ``text``, as
        far as they are equal. Raises ValueError as ``render_chat``."""
        ...

    def without_opening(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` without the opening tokens that they begin with, if they do."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, special tokens skipped."""
        ...

    def written(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, with special tokens."""
        ...

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """The entries of the vocabulary, as the tokenizer's file has them."""
        ...

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A new incremental detokenizer for one sequence, which continues ``prompt``."""
        ...

    def token_bytes(self, token_id: int, previous: int | None) -> bytes | None:
        """The bytes of a token after ``previous``, the token with text before it (None: the first
        of a text); those of its name for a special token. None for an id without a token."""
        ...

    def spellings(self, text: str) -> Sequence[str]:
        """``text``, and what its tokens decode to with special tokens written out: there may be a
        space after a special token."""
        ...

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation in the model's chat template, with its opening tokens.

        ``tools`` are as in a request; arguments of past calls are objects, not their JSON text.
        ``template_kwargs`` are variables of the template.

        Raises ValueError, with a message for the caller, when the model has no template or the
        template rejects these messages.
        """
        ...


@dataclass(frozen=True, slots=True)
class DecoderInfo:
    """What computes the model: ``kernels`` is ``module``, ``torch`` or a native set,
    ``tensor_parallel`` the number of processes that share it (None: one), and ``weights`` how the
    checkpoint is quantized (None: it is not).

    With ``quantize`` other than ``none``, ``perplexity_ratio`` says how many times as large the
    perplexity of ordinary text is as without, and ``top1_agreement`` at which part of the positions
    the likeliest token is the same.
    """

    kernels: str
    device: str
    dtype: str
    quantize: str = "none"
    perplexity_ratio: float | None = None
    top1_agreement: float | None = None
    tensor_parallel: int | None = None
    weights: str | None = None

    def facts(self) -> dict[str, str | float]:
        """The fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def labels(self) -> dict[str, str]:
        """All fields as text, empty without a value."""
        return {name: "" if value is None else str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class ChatTraits:
    """What the model's chat template can do.

    ``renders_tools``: it shows tools. ``call_format`` is how the model writes calls, or how it is
    to be read by setting; None: unknown. ``names_first`` is of Mistral's format: a name before the
    arguments instead of an object. ``reasons``: the model may think before it answers.
    ``special`` are the texts of special tokens; ``atomic`` the ids of those that a grammar names by
    id, by text.
    """

    renders_tools: bool = False
    call_format: CallFormat | None = None
    names_first: bool = False
    reasons: bool = False
    special: frozenset[str] = frozenset()
    atomic: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an encoder-decoder has and a decoder has not: the tokens that its decoder begins with,
    ``max_tokens`` of an input, soft prompt included, and the positions of a block of KV."""

    start: tuple[int, ...]
    max_tokens: int
    block_size: int

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks for the KV of an input."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the one base model. ``created`` is a Unix time; ``max_positions`` counts
    virtual tokens too.

    ``vocab_size`` is the number of ids that can be fed in: the rows of the input embeddings, which
    may differ from the tokenizer's size. ``logits_size`` is the number of ids that can be sampled;
    ``eos_token_ids`` are below it. ``encoder`` is None for a decoder.
    """

    name: str
    base: BaseSpec
    decoder: DecoderInfo
    max_positions: int
    vocab_size: int
    logits_size: int
    eos_token_ids: frozenset[int]
    created: int
    tokenizer: Tokenizer
    encoder: EncoderInfo | None = None
    chat: ChatTraits = ChatTraits()
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """Fields of a request that the model sets where neither the request nor a recipe does."""
    prefix_warnings: Callable[[int | None], list[str]] = lambda _: []
    """What a tenant should know of so many virtual tokens in front of a prompt on this base; None:
    some stand inside."""

    def count_prefix_tokens(self, text: str, *, role: TextRole = TextRole.RAW) -> int:
        """Positions that a text prefix occupies. Raises ArtifactRefused for a text with a token
        that the model has no embedding for, and for a role that its chat template has not."""
        try:
            system = role is TextRole.SYSTEM
            encode = self.tokenizer.encode_system if system else self.tokenizer.encode_prefix
            token_ids = encode(text)
        except ValueError as error:
            raise ArtifactRefused(
                "unsupported_role",
                f"expected the role raw for the base {self.base.name}: {error}",
                param="role",
            ) from None
        self._check_known(token_ids)
        return len(token_ids)

    def count_stack_tokens(self, parts: Sequence[str | int]) -> int:
        """Positions of a stack of texts and of so many virtual tokens. Raises ArtifactRefused as
        ``count_prefix_tokens``."""
        count = 0
        for run in encoded_runs(parts, self.tokenizer):
            if isinstance(run, int):
                count += run
            else:
                self._check_known(run)
                count += len(run)
        return count

    def _check_known(self, token_ids: Sequence[int]) -> None:
        if max(token_ids, default=0) >= self.vocab_size:
            raise ArtifactRefused(
                "unknown_token",
                f"expected tokens from 0 to {self.vocab_size - 1}, for which the model has "
                f"embeddings; the text has token {max(token_ids)}",
                param="text",
            )
