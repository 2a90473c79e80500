"""The served base model for the API: names, limits and a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefixd.store.artifact.config import BaseSpec


class Tokenizer(Protocol):
    """Text to token ids and back. Called from worker threads."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, by default with the model's opening tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, special tokens skipped."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token, for log-probabilities."""
        ...

    def render_chat(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the model's chat template, with its opening tokens.

        Raises ValueError, with a message for the caller, when the model has no template or the
        template rejects these messages.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the one base model. ``created`` is a Unix time; ``max_positions`` counts
    virtual tokens too."""

    name: str
    base: BaseSpec
    max_positions: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    created: int
    tokenizer: Tokenizer

    def count_prefix_tokens(self, text: str) -> int:
        """Positions that a text prefix occupies."""
        return len(self.tokenizer.encode(text))
