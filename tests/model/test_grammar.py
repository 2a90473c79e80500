"""Grammars through llguidance, on a vocabulary of bytes: what follows, and what is refused."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from prefixd.server.engine.constraint import (
    Constraint,
    ConstraintFailed,
    Grammar,
    GrammarKind,
    GrammarRefused,
    is_allowed,
)
from prefixd.server.model.grammar import child
from prefixd.server.model.grammar.compiler import LLGuidanceCompiler
from prefixd.server.model.grammar.source import Vocabulary
from prefixd.server.model.grammar.trial import NUM_PROCESSES
from prefixd.server.testing import EOS, VOCAB_SIZE, byte_tokenizer_json

WIDER = VOCAB_SIZE + 40


@pytest.fixture(scope="module")
def compiler() -> Iterator[LLGuidanceCompiler]:
    compiler = LLGuidanceCompiler(
        lambda: Vocabulary(byte_tokenizer_json(), VOCAB_SIZE, WIDER, (EOS,))
    )
    yield compiler
    compiler.close()


def schema(value: Any, **more: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value), **more)


def following(constraint: Constraint, text: str, *, ends: tuple[int, ...] = (EOS,)) -> set[int]:
    progress = constraint.start(ends)
    progress.advance(text.encode())
    mask = progress.allowed(())
    assert mask is not None
    assert len(mask) == -(-WIDER // 32) * 4
    return {token_id for token_id in range(len(mask) * 8) if is_allowed(mask, token_id)}


def test_masks_follow_the_output(compiler: LLGuidanceCompiler) -> None:
    constraint = compiler.compile(schema({"enum": ["ab", "ac"]}))
    assert following(constraint, "") == {ord('"')}
    assert following(constraint, '"a') == {ord("b"), ord("c")}
    assert following(constraint, '"ab"') == {EOS}
    assert following(constraint, '"ab"', ends=(EOS, ord("z"))) == {EOS, ord("z")}


def test_outputs_under_one_constraint_are_independent(compiler: LLGuidanceCompiler) -> None:
    constraint = compiler.compile(Grammar(GrammarKind.REGEX, "[ab]{2}c"))
    one, two = constraint.start((EOS,)), constraint.start((EOS,))
    one.advance(b"ab")
    two.advance(b"b")
    assert one.allowed(()) != two.allowed(())
    assert following(constraint, "ba") == {ord("c")}


def test_end_of_text_may_follow_a_complete_output_alone(compiler: LLGuidanceCompiler) -> None:
    constraint = compiler.compile(Grammar(GrammarKind.REGEX, "a+"))
    assert following(constraint, "") == {ord("a")}
    assert following(constraint, "aa") == {ord("a"), EOS}
    assert following(constraint, "aa", ends=()) == {ord("a")}


def test_complete_output_without_an_end_has_no_mask(compiler: LLGuidanceCompiler) -> None:
    constraint = compiler.compile(Grammar(GrammarKind.CHOICE, '["a"]'))
    for ends, banned in (((), ()), ((EOS,), (EOS,))):
        progress = constraint.start(ends)
        progress.advance(b"a")
        assert progress.allowed(banned) is None


def test_output_that_cannot_go_on_fails(compiler: LLGuidanceCompiler) -> None:
    progress = compiler.compile(Grammar(GrammarKind.CHOICE, '["ab"]')).start((EOS,))
    with pytest.raises(ConstraintFailed, match="no token of the model"):
        progress.allowed((ord("a"),))
    with pytest.raises(ConstraintFailed, match="cannot be followed any further"):
        progress.advance(b"x")


def test_json_is_compact_unless_whitespace_is_allowed(compiler: LLGuidanceCompiler) -> None:
    value = {"type": "array", "items": {"type": "integer"}}
    assert ord(" ") not in following(compiler.compile(schema(value)), "[1,")
    free = compiler.compile(schema(value, any_whitespace=True))
    assert ord(" ") in following(free, "[1,")


def test_mask_has_only_ids_of_the_tokenizer(compiler: LLGuidanceCompiler) -> None:
    anything = following(compiler.compile(Grammar(GrammarKind.REGEX, "(?s:.)*")), "")
    assert max(anything) == EOS


MANY_PATTERNS = {
    "type": "string",
    "allOf": [{"pattern": f".*{chr(97 + i)}.{{8}}{chr(98 + i)}"} for i in range(20)],
}
CHAIN = "start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(2000)) + 'r2000: "y"\n'


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        pytest.param(
            schema(MANY_PATTERNS), "more than (2 s|256 MiB)", id="patterns", marks=pytest.mark.slow
        ),
        pytest.param(Grammar(GrammarKind.LARK, CHAIN), "nested too deeply", id="chain"),
    ],
)
def test_grammar_over_a_limit_ends_a_process_of_its_own(
    compiler: LLGuidanceCompiler, grammar: Grammar, said: str
) -> None:
    with pytest.raises(GrammarRefused, match=said) as refused:
        compiler.compile(grammar)
    assert refused.value.over_limit
    for _ in range(NUM_PROCESSES + 1):
        assert following(compiler.compile(Grammar(GrammarKind.REGEX, "ok")), "o") == {ord("k")}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (schema(nested(200)), "at most 100 lists and objects in one another"),
        (schema({"enum": ["x" * 70_000]}), "at most 65536 bytes"),
        (schema({"multipleOf": 1_234_567}), r"at \$\.multipleOf: .* up to 10000"),
        (schema({"minItems": float("inf")}), r"at \$\.minItems: .* from 0 to 65536"),
        (schema({"maxLength": float("nan")}), r"at \$\.maxLength: .* from 0 to 65536"),
        (schema({"minItems": 10**6}), r"at \$\.minItems: .* from 0 to 65536"),
        (schema({"pattern": "a" * 5000}), r"at \$\.pattern: .* at most 4096 bytes"),
        (schema({"$ref": "#"}), "no text matches it"),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    ],
)
def test_grammar_outside_of_the_subset_is_refused(
    compiler: LLGuidanceCompiler, grammar: Grammar, said: str
) -> None:
    with pytest.raises(GrammarRefused, match=said) as refused:
        compiler.compile(grammar)
    assert not refused.value.over_limit


@pytest.mark.parametrize(("step", "is_refused"), [(0.004, False), (0.011, True)])
def test_grammar_whose_tokens_take_long_is_refused(step: float, is_refused: bool) -> None:
    """By the clock of the process that tries it."""
    tokenizer = Vocabulary(byte_tokenizer_json(), VOCAB_SIZE, VOCAB_SIZE, (EOS,)).load()
    clock = itertools.count(step=step).__next__
    answer = child._try(tokenizer, Grammar(GrammarKind.REGEX, "[ab]{40}"), clock)
    assert answer.get("over_limit", False) is is_refused
    short = child._try(tokenizer, Grammar(GrammarKind.REGEX, "[ab]{2}"), itertools.count().__next__)
    assert short == {"error": None}


def test_grammar_without_a_second_token_is_refused(compiler: LLGuidanceCompiler) -> None:
    properties = {f"p{i}": {"type": "string"} for i in range(300)}
    with pytest.raises(GrammarRefused, match="items; max is 1000") as refused:
        compiler.compile(schema({"type": "object", "properties": properties}))
    assert refused.value.over_limit


def test_exponential_references_compile(compiler: LLGuidanceCompiler) -> None:
    """2 to the 30 values, in a schema of 30 references."""
    defs: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(1, 30):
        inner = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {"type": "array", "items": inner, "minItems": 2, "maxItems": 2}
    constraint = compiler.compile(schema({"$defs": defs, "$ref": "#/$defs/d29"}))
    assert following(constraint, "[" * 28) == {ord("[")}


def test_closed_compiler_starts_processes_again() -> None:
    compiler = LLGuidanceCompiler(
        lambda: Vocabulary(byte_tokenizer_json(), VOCAB_SIZE, VOCAB_SIZE, (EOS,))
    )
    for _ in range(2):
        assert compiler.compile(Grammar(GrammarKind.CHOICE, '["a"]'))
        compiler.close()


def test_long_text_can_be_followed_to_its_limit(compiler: LLGuidanceCompiler) -> None:
    """A bounded length has a state for each character."""
    constraint = compiler.compile(schema({"type": "string", "maxLength": 60_000}))
    assert ord('"') in following(constraint, '"' + "a" * 40_000)
