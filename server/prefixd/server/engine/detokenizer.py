"""What the engine asks of a tokenizer: the text of a growing sequence of tokens."""

from collections.abc import Collection, Sequence
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


class ShownSpecials:
    """A Detokenizer in whose text the special tokens ``shown`` are written out."""

    def __init__(self, inner: Detokenizer, shown: Collection[str]) -> None:
        self._inner = inner
        self._shown = shown

    @property
    def previous(self) -> int | None:
        """See Detokenizer."""
        return self._inner.previous

    def push(self, token_id: int) -> Sequence[TokenText]:
        """See Detokenizer."""
        return self._written(self._inner.push(token_id))

    def tentative(self, limit: int) -> Sequence[TokenText]:
        """See Detokenizer."""
        return self._written(self._inner.tentative(limit))

    def flush(self) -> Sequence[TokenText]:
        """See Detokenizer."""
        return self._written(self._inner.flush())

    def special(self, token_id: int) -> str:
        """See Detokenizer."""
        special = self._inner.special(token_id)
        return "" if special in self._shown else special

    def _written(self, tokens: Sequence[TokenText]) -> Sequence[TokenText]:
        return [
            token._replace(text=token.text + token.special, special="")
            if token.special in self._shown
            else token
            for token in tokens
        ]
