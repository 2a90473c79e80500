"""What a schema leaves endless gets an end, and nothing else in a schema changes."""

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from prefixd.server.api.answers.formats import CallFormat
from prefixd.server.api.generate.schema_bounds import LONGEST, with_bounds
from prefixd.server.api.generate.structure import ResponseFormat, StructuredOutputs
from prefixd.server.api.generate.tools.grammar import AnswerGrammar
from prefixd.server.engine.constraint import Grammar
from prefixd.server.model.grammar.source import Vocabulary, new_matcher
from prefixd.server.testing import EOS, VOCAB_SIZE, byte_tokenizer_json

TIME, DATE_TIME = ({"format": name, "maxLength": longest} for name, longest in LONGEST.items())

RANGE = {"type": "number", "minimum": 0, "maximum": 1}


@pytest.mark.parametrize(
    ("schema", "bounded"),
    [
        ({"type": "string", "format": "time"}, {"type": "string", **TIME}),
        (
            {"items": [{"format": "time"}], "anyOf": [{"format": "date-time"}]},
            {"items": [TIME], "anyOf": [DATE_TIME]},
        ),
        (
            {"properties": {"enum": {"format": "time"}}, "$defs": {"const": {"format": "time"}}},
            {"properties": {"enum": TIME}, "$defs": {"const": TIME}},
        ),
        ({"additionalProperties": {"format": "time"}}, {"additionalProperties": TIME}),
        ({"properties": {"format": True}}, {"properties": {"format": True}}),
        ({"$ref": "#", **RANGE}, {"$ref": "#", **RANGE, "multipleOf": 1e-9}),
        (
            {"type": ["null", "number"], "exclusiveMinimum": 0, "exclusiveMaximum": 1e-6},
            {
                "type": ["null", "number"],
                "exclusiveMinimum": 0,
                "exclusiveMaximum": 1e-6,
                "multipleOf": 1e-9,
            },
        ),
    ],
)
def test_times_and_fractions_get_an_end_wherever_they_are(
    schema: dict[str, Any], bounded: dict[str, Any]
) -> None:
    before = json.dumps(schema)
    assert with_bounds(schema) == bounded
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"format": "email"},
        {"format": "time", "maxLength": 90},
        {"format": "time", "minLength": 40},
        {"format": "time", "enum": ["12:00:00.12345678901234567890Z"]},
        {"format": ["time"]},
        {**RANGE, "type": "integer"},
        {**RANGE, "multipleOf": 0.3},
        {**RANGE, "const": 1e-12},
        {**RANGE, "maximum": 1e-7},
        {**RANGE, "maximum": "1"},
        {**RANGE, "maximum": True},
        {"type": "number", "minimum": 0},
        {"type": "number"},
        {"minimum": 0, "maximum": 1},
        {"const": {"format": "time"}, "enum": [{"format": "time"}], "default": {"format": "time"}},
        {"properties": [{"format": 5}], "format": {"format": None}},
    ],
)
def test_everything_else_stays(schema: dict[str, Any]) -> None:
    assert with_bounds(schema) == schema


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return Vocabulary(byte_tokenizer_json(), VOCAB_SIZE, VOCAB_SIZE, (EOS,)).load()


def _is_accepted(tokenizer: LLTokenizer, grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    matcher, tokens = new_matcher(tokenizer, grammar), list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("offset", ["Z", "+23:59"])
@pytest.mark.parametrize(("name", "day"), [("time", ""), ("date-time", "2020-01-31T")])
def test_a_time_has_nine_digits_of_a_second_everywhere(
    tokenizer: LLTokenizer, name: str, day: str, offset: str
) -> None:
    at_time = {"type": "string", "format": name}
    schema: dict[str, Any] = {"type": "object", "properties": {"at": at_time}}
    schema |= {"required": ["at"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "note", "parameters": schema}}
    response = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    spaced = AnswerGrammar(CallFormat.JSON, {}).of([tool])
    for digits, is_accepted in (("123456789", True), ("1" * 20, False)):
        at = f"{day}12:30:00.{digits}{offset}"
        compact = json.dumps({"at": at}, separators=(",", ":"))
        grammar = ResponseFormat.model_validate(response).grammar
        assert _is_accepted(tokenizer, grammar, compact) is is_accepted
        for text in (schema, json.dumps(schema)):
            grammar = StructuredOutputs.model_validate({"json": text}).asked
            assert _is_accepted(tokenizer, grammar, compact) is is_accepted
        calls = json.dumps([{"name": "note", "arguments": {"at": at}}])
        assert _is_accepted(tokenizer, spaced, calls) is is_accepted


@pytest.mark.parametrize(
    ("number", "is_accepted"),
    [
        ("1", True),
        ("0.5", True),
        ("99.123456789", True),
        ("99.1234567891", False),
        ("100.5", False),
    ],
)
def test_a_number_in_a_range_has_nine_digits_behind_the_point(
    tokenizer: LLTokenizer, number: str, is_accepted: bool
) -> None:
    schema = {"type": "number", "minimum": 0.5, "exclusiveMaximum": 99.5}
    grammar = StructuredOutputs.model_validate({"json": schema}).asked
    assert _is_accepted(tokenizer, grammar, number) is is_accepted
