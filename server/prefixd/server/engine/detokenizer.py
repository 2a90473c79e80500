"""What the engine asks of a tokenizer: the text of a growing sequence of tokens."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class TokenText(NamedTuple):
    """Text of one token that can no longer change.

    ``special`` is the text of a special token: stop strings see it, after ``text``; the answer does
    not contain it. The first ``lead`` characters of ``text`` belong to earlier tokens.
    """

    text: str
    special: str = ""
    lead: int = 0


class Detokenizer(Protocol):
    """Turns one sequence's growing token ids into text, incrementally.

    ``previous`` is the last token with text, in the prompt or the output; None where the text
    begins.
    """

    @property
    def previous(self) -> int | None: ...

    def push(self, token_id: int) -> Sequence[TokenText]:
        """Add a token. Returns the tokens whose text is final now, oldest first: often this one,
        none in the middle of a character."""
        ...

    def tentative(self, limit: int) -> Sequence[TokenText]:
        """The last ``limit`` of the tokens added whose text is complete but may still change."""
        ...

    def flush(self) -> Sequence[TokenText]:
        """The tokens that were not returned yet, at the end of the text."""
        ...

    def special(self, token_id: int) -> str:
        """Text of a special token; empty for any other."""
        ...
