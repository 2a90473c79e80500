"""From a grammar as it was asked for to a matcher of llguidance, with limits on what it computes.

Imports no torch: the process of ``trial`` is small.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from prefixd.server.engine.constraint import Grammar, GrammarKind, GrammarRefused

_MAX_MESSAGE = 200
_TABLE_OF_TOKENS = re.compile(r"; following special tokens.*")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model: ``tokenizer`` is the text of a ``tokenizer.json`` of ``num_tokens``
    ids, ``num_ids`` the ids that can be sampled, ``eos`` those that end a text."""

    tokenizer: str
    num_tokens: int
    num_ids: int
    eos: Sequence[int]

    def load(self) -> LLTokenizer:
        """Takes about a second for each 100,000 tokens. Raises ValueError for a tokenizer that
        llguidance cannot read."""
        num_ids = max(self.num_tokens, self.num_ids)
        return LLTokenizer(self.tokenizer, n_vocab=num_ids, eos_token=list(self.eos) or None)


def limits() -> LLParserLimits:
    """A mask takes about 5 ms where these end it (``child`` refuses what takes longer without), a
    matcher a few tens of MiB."""
    return LLParserLimits(
        max_items_in_row=1_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=100_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def new_matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Compile a grammar. Raises GrammarRefused with llguidance's message."""
    try:
        text = _text_of(grammar)
    except ValueError as error:
        raise GrammarRefused(one_line(str(error))) from error
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits())
    if matcher.is_error():
        raise GrammarRefused(one_line(matcher.get_error()))
    return matcher


def one_line(message: str) -> str:
    """What a message of llguidance says, in one line of bounded length."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if message.startswith("NoExtension"):
        return "no text matches it"
    said = _TABLE_OF_TOKENS.sub("", (errors or lines or ["no reason given"])[0])
    return said if len(said) <= _MAX_MESSAGE else said[:_MAX_MESSAGE] + "..."


def _text_of(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            overrides = {
                "whitespace_flexible": grammar.any_whitespace,
                "lenient": False,
                "coerce_one_of": False,
            }
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides=overrides)  # type: ignore[arg-type]
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.source)
        case GrammarKind.CHOICE:
            texts = json.loads(grammar.source)
            literals = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return LLMatcher.grammar_from_lark(f"start: {literals}\n")
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.source)
