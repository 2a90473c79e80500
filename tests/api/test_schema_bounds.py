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
DAY = {"type": "string", "format": "date-time"}


BOUNDED = {**RANGE, "multipleOf": 1e-9}


@pytest.mark.parametrize(
    ("schema", "bounded"),
    [
        ({"type": "string", "format": "time"}, {"type": "string", **TIME}),
        ({"anyOf": [DAY, RANGE]}, {"anyOf": [{**DAY, **DATE_TIME}, BOUNDED]}),
        (
            {"items": [RANGE], "additionalItems": RANGE},
            {"items": [BOUNDED], "additionalItems": BOUNDED},
        ),
        ({"prefixItems": [RANGE], "items": RANGE}, {"prefixItems": [BOUNDED], "items": BOUNDED}),
        (
            {"type": "object", "properties": {"enum": RANGE, "allOf": DAY}, "title": "a"},
            {
                "type": "object",
                "properties": {"enum": BOUNDED, "allOf": {**DAY, **DATE_TIME}},
                "title": "a",
            },
        ),
        ({"additionalProperties": RANGE}, {"additionalProperties": BOUNDED}),
        (
            {"patternProperties": {"a": RANGE}, "maxProperties": 2, "additionalProperties": RANGE},
            {
                "patternProperties": {"a": BOUNDED},
                "maxProperties": 2,
                "additionalProperties": BOUNDED,
            },
        ),
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
def test_times_and_fractions_get_an_end_where_nothing_else_describes_them(
    schema: dict[str, Any], bounded: dict[str, Any]
) -> None:
    before = json.dumps(schema)
    assert with_bounds(schema) == bounded
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "time", "maxLength": 90},
        {"type": "string", "format": "time", "minLength": 40},
        {"type": "string", "format": "time", "enum": ["12:00:00.12345678901234567890Z"]},
        {"type": "string", "format": ["time"]},
        {"const": RANGE, "enum": [DAY], "default": RANGE},
        {"default": RANGE, "type": "object"},
        {"properties": [{"format": 5}], "format": {"format": None}},
        {"properties": {"format": True}},
        {**RANGE, "type": "integer"},
        {**RANGE, "multipleOf": 0.3},
        {**RANGE, "const": 1e-12},
        {**RANGE, "maximum": 1e-7},
        {**RANGE, "maximum": "1"},
        {**RANGE, "maximum": True},
        {"type": "number", "minimum": -1.5, "maximum": 10**400},
        {"type": "number", "minimum": 0},
        {"type": "number"},
        {"minimum": 0, "maximum": 1},
        {"allOf": [RANGE, {"multipleOf": 5}]},
        {**RANGE, "anyOf": [{"const": 0.12345678901}]},
        {"properties": {"a": RANGE}, "anyOf": [{"properties": {"a": {"multipleOf": 5}}}]},
        {"properties": {"a": RANGE}, "patternProperties": {"a": {"multipleOf": 5}}},
        {"patternProperties": {"a": RANGE, "b": {"multipleOf": 5}}},
        {"$ref": "#/$defs/a", "multipleOf": 5, "$defs": {"a": RANGE}},
        {"allOf": [DAY, {"minLength": 40}]},
        {"type": "array", "prefixItems": [RANGE] * 800},
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


def test_a_number_in_a_range_may_be_a_multiple_as_another_schema_says(
    tokenizer: LLTokenizer,
) -> None:
    schema = {"allOf": [{"type": "number", "minimum": 0, "maximum": 100}, {"multipleOf": 5}]}
    grammar = StructuredOutputs.model_validate({"json": schema}).asked
    assert _is_accepted(tokenizer, grammar, "95")
    assert not _is_accepted(tokenizer, grammar, "1.474836480")
