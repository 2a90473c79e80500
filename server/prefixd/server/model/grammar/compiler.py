"""Compiles grammars, and follows outputs under them."""

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer

from prefixd.server.engine.constraint import (
    Constraint,
    ConstraintFailed,
    Grammar,
    GrammarRefused,
)
from prefixd.server.model.grammar.source import Vocabulary, new_matcher, one_line
from prefixd.server.model.grammar.subset import check_grammar
from prefixd.server.model.grammar.trial import Trials


class LLGuidanceCompiler:
    """A GrammarCompiler. The vocabulary is read at the first grammar."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._read = vocabulary
        self._lock = threading.Lock()
        self._loaded: tuple[Vocabulary, LLTokenizer, Trials] | None = None

    def compile(self, grammar: Grammar) -> Constraint:
        """Raises GrammarRefused."""
        check_grammar(grammar)
        vocabulary, tokenizer, trials = self._load()
        trials.run(grammar)
        return GrammarConstraint.of(new_matcher(tokenizer, grammar), vocabulary)

    def close(self) -> None:
        """End the processes of the trials."""
        with self._lock:
            loaded = self._loaded
        if loaded is not None:
            loaded[2].close()

    def _load(self) -> tuple[Vocabulary, LLTokenizer, Trials]:
        with self._lock:
            if self._loaded is None:
                vocabulary = self._read()
                try:
                    tokenizer = vocabulary.load()
                except ValueError as error:
                    raise GrammarRefused(
                        f"the model's tokenizer cannot be constrained: {one_line(str(error))}"
                    ) from error
                self._loaded = vocabulary, tokenizer, Trials(vocabulary)
            return self._loaded


@dataclass(frozen=True, slots=True)
class Position:
    """What may follow: a bit mask without the ends of a text, and whether one may come here."""

    mask: bytes
    may_end: bool


@dataclass(frozen=True, slots=True)
class GrammarConstraint:
    """A Constraint. What is computed of the lexer is shared by all outputs under it."""

    matcher: LLMatcher
    first: Position
    vocabulary: Vocabulary

    @classmethod
    def of(cls, matcher: LLMatcher, vocabulary: Vocabulary) -> "GrammarConstraint":
        """Raises GrammarRefused for a grammar of which no token is the beginning."""
        try:
            first = _position(matcher, vocabulary)
        except ConstraintFailed as failure:
            raise GrammarRefused(str(failure)) from failure
        return cls(matcher, first, vocabulary)

    def start(self, ends: Collection[int]) -> "GrammarProgress":
        """The progress of a new output, which the ids in ``ends`` may end."""
        return GrammarProgress(self, self.matcher.deep_copy(), frozenset(ends))


class GrammarProgress:
    """A Progress."""

    def __init__(
        self, constraint: GrammarConstraint, matcher: LLMatcher, ends: frozenset[int]
    ) -> None:
        self._vocabulary, self._matcher, self._ends = constraint.vocabulary, matcher, ends
        self._position: Position | None = constraint.first

    def advance(self, token_ids: Iterable[int]) -> None:
        """Take in tokens that were allowed."""
        new = list(token_ids)
        if new:
            self._position = None
            if not self._matcher.consume_tokens(new):
                raise ConstraintFailed(_said(self._matcher))

    def allowed(self, banned: Collection[int]) -> bytes | None:
        """The bit mask of what may follow."""
        position = self._position = self._position or _position(self._matcher, self._vocabulary)
        mask = bytearray(position.mask)
        num_ids = self._vocabulary.num_ids
        if position.may_end:
            for token_id in self._ends:
                if token_id < num_ids:
                    mask[token_id >> 3] |= 1 << (token_id & 7)
        _clear(mask, banned)
        if any(mask):
            return bytes(mask)
        if position.may_end:
            return None
        raise ConstraintFailed("no token of the model can continue this output under its grammar")


def _position(matcher: LLMatcher, vocabulary: Vocabulary) -> Position:
    """Raises ConstraintFailed where the matcher's limits do not suffice."""
    mask = bytearray(matcher.compute_bitmask())
    if matcher.is_error():
        raise ConstraintFailed(_said(matcher))
    num_bytes, left = divmod(vocabulary.num_ids, 8)
    del mask[-(-vocabulary.num_ids // 32) * 4 :]
    if left:
        mask[num_bytes] &= (1 << left) - 1
        num_bytes += 1
    mask[num_bytes:] = bytes(len(mask) - num_bytes)
    _clear(mask, vocabulary.eos)
    return Position(bytes(mask), matcher.is_accepting())


def _clear(mask: bytearray, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if token_id >> 3 < len(mask):
            mask[token_id >> 3] &= ~(1 << (token_id & 7)) & 0xFF


def _said(matcher: LLMatcher) -> str:
    return f"the grammar cannot be followed any further: {one_line(matcher.get_error())}"
