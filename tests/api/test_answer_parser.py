"""Reasoning, content and calls in the text of an answer."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.api.answers.formats import SYNTAX, CallFormat
from prefixd.server.api.answers.json_scanner import JsonScanner, MalformedJson
from prefixd.server.api.answers.parser import (
    AnswerParser,
    AnswerSyntax,
    ParsedAnswer,
    assembled,
    parse,
)
from prefixd.server.api.answers.pieces import (
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
)

HERMES, LLAMA3, MISTRAL, JSON = CallFormat
NAMES = ("f", "g")


def calls_of(text: str, syntax: CallFormat, *, is_cut: bool = False, **options: Any) -> Any:
    answer = parse(text, AnswerSyntax(syntax, NAMES, **options), is_cut=is_cut)
    return answer.content, answer.calls


@pytest.mark.parametrize(
    ("syntax", "text", "content", "calls"),
    [
        (HERMES, "Hello <b> there ", "Hello <b> there ", []),
        (
            HERMES,
            (
                'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
                '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>\n'
            ),
            "Sure.",
            [("f", '{"a": 1}'), ("other", "{}")],
        ),
        (
            HERMES,
            '<tool_call>{"name":"f","arguments":{}} {"name":"g"}',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (
            HERMES,
            '<tool_call>{"arguments": {"a": "}"}, "id": 3, "name": "f"}',
            "",
            [("f", '{"a": "}"}')],
        ),
        (
            HERMES,
            '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>',
            "",
            [("f", '{"a":1}')],
        ),
        (HERMES, '<tool_call>{"name":"f","arguments":null}</tool_call>x', "x", [("f", "{}")]),
        (LLAMA3, '{"name": "f", "parameters": {"a": -1.5e3}}', "", [("f", '{"a": -1.5e3}')]),
        (
            LLAMA3,
            ' {"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (LLAMA3, 'I call <|python_tag|>{"name": "x", "parameters": {}}', "I call", [("x", "{}")]),
        (LLAMA3, '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
        (LLAMA3, '{"answer": 42}', '{"answer": 42}', []),
        (LLAMA3, 'Hi {"name": "f", "parameters": {}}', 'Hi {"name": "f", "parameters": {}}', []),
        (LLAMA3, "<|python_tag|>f.call()", "<|python_tag|>f.call()", []),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", '{"a": [1]}'), ("g", "{}")],
        ),
        (
            MISTRAL,
            'Ok [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}',
            "Ok",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
        (MISTRAL, "[TOOL_CALLS]nothing", "[TOOL_CALLS]nothing", []),
        (MISTRAL, "[1, 2]", "[1, 2]", []),
        (JSON, '[{"name": "f", "arguments": {}}, {"name": "g"}]', "", [("f", "{}"), ("g", "{}")]),
        (JSON, ' {"name": "f", "arguments": {}}', "", [("f", "{}")]),
        (JSON, "[1, 2]", "[1, 2]", []),
    ],
)
def test_calls_are_found(
    syntax: CallFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert calls_of(text, syntax) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        'x <tool_call>{"name": "f", "arguments": {"a": Oslo}}</tool_call> y',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800"}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1',
        "<tool_call>",
        "<tool_ca",
    ],
)
def test_malformed_call_is_content(text: str) -> None:
    assert calls_of(text, HERMES) == (text, [])


def test_call_cut_by_a_limit_of_tokens_keeps_its_partial_arguments() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"city": "Os'
    assert calls_of(text, HERMES, is_cut=True) == ("", [("f", '{"city": "Os')])
    before_arguments = '<tool_call>{"name": "f"'
    assert calls_of(before_arguments, HERMES, is_cut=True) == (before_arguments, [])
    within_closer = '<tool_call>{"name": "f", "arguments": {}}</tool'
    assert calls_of(within_closer, HERMES, is_cut=True) == ("", [("f", "{}")])


def test_calls_after_the_limit_are_dropped() -> None:
    text = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]'
    assert calls_of(text, JSON, max_calls=1) == ("", [("f", "{}")])


@pytest.mark.parametrize(
    ("text", "is_reasoning", "reasoning", "content"),
    [
        ("<think>\nWell.\n</think>\n\nYes.", False, "Well.", "Yes."),
        ("Well.\n</think>\n\nYes.", True, "Well.", "Yes."),
        ("<think>Well.</think>Yes.", True, "Well.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("  Yes. <think>no</think>", False, "", "  Yes. <think>no</think>"),
        ("<thing>", False, "", "<thing>"),
        ("<think>Well", False, "Well", ""),
        ("Well", True, "Well", ""),
    ],
)
def test_reasoning_is_separate(text: str, is_reasoning: bool, reasoning: str, content: str) -> None:
    answer = parse(text, AnswerSyntax(reasons=True, is_reasoning=is_reasoning))
    assert answer == ParsedAnswer(content, reasoning)
    hidden = AnswerSyntax(reasons=True, is_reasoning=is_reasoning, shows_reasoning=False)
    assert parse(text, hidden) == ParsedAnswer(content)


def test_a_call_in_the_reasoning_is_reasoning() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    answer = parse(f"<think>{call}</think>{call}", AnswerSyntax(HERMES, NAMES, reasons=True))
    assert answer == ParsedAnswer("", call, [("f", "{}")])


def pieces_of(texts: list[str], syntax: AnswerSyntax) -> list[Piece]:
    parser = AnswerParser(syntax)
    pieces = [piece for text in texts for piece in parser.push(text)]
    return pieces + parser.end(is_cut=False)


def test_a_stream_has_the_name_before_pieces_of_arguments() -> None:
    text = 'Hi <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert pieces_of(list(text), AnswerSyntax(HERMES, NAMES)) == [
        *(Content(letter) for letter in "Hi"),
        CallStart(0, "f"),
        *(CallArguments(0, letter) for letter in '{"a": 1}'),
    ]


WORDS = st.sampled_from(
    [
        *(mark for syntax in SYNTAX.values() for mark in (*syntax.marks, syntax.separator) if mark),
        *("<think>", "</think>", "<tool_", "[", "]", "{", "}", '"', ",", ":", " ", "\n", "\\", "x"),
        *('"name"', '"f"', '"arguments"', '"parameters"', "f", "1", "-", "null", "é", "{}"),
        *('{"name": "f", "arguments": {"a": [1, "é"]}}', '{"name": "g", "parameters": {'),
        *("<tool_call>\n", "\n</tool_call>", '[TOOL_CALLS]f[ARGS]{"a": 1}', '{"arguments": {}, '),
    ]
)
SYNTAXES = st.builds(
    AnswerSyntax,
    calls=st.sampled_from([*CallFormat, None]),
    names=st.just(NAMES),
    max_calls=st.sampled_from([None, 1]),
    reasons=st.booleans(),
    is_reasoning=st.booleans(),
)


@given(st.lists(WORDS, max_size=12).map("".join), SYNTAXES, st.data())
def test_a_stream_says_the_same_however_the_text_is_split(
    text: str, syntax: AnswerSyntax, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    places = [0, *cuts, len(text)]
    texts = [text[start:stop] for start, stop in itertools.pairwise(places)]
    assert assembled(pieces_of(texts, syntax)) == parse(text, syntax)
    assert assembled(pieces_of(list(text), syntax)) == parse(text, syntax)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<tool_call></tool_call>", CallFormat.HERMES),
        ("<tool_call>[</tool_call>", CallFormat.HERMES),
        ("<tool_call>[]</tool_call> so", CallFormat.HERMES),
        ("[TOOL_CALLS][", CallFormat.MISTRAL),
        ("[]", CallFormat.JSON),
    ],
)
def test_marks_without_a_call_are_content(text: str, calls: CallFormat) -> None:
    assert parse(text, AnswerSyntax(calls=calls, names=NAMES)).content == text


@given(st.lists(WORDS, max_size=12).map("".join), SYNTAXES)
def test_no_text_is_lost_without_marks(text: str, syntax: AnswerSyntax) -> None:
    answer = parse(text, syntax)
    if not answer.calls and not syntax.reasons:
        assert "".join(answer.content.split()) == "".join(text.split())
    assert all(json.loads(arguments) is not None for _, arguments in answer.calls)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON_VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_scanner_finds_the_end_of_any_json(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    scanner = JsonScanner()
    belongs = [
        scanner.push(character) for character in text + ","[: not scanner.done] if not scanner.done
    ]
    assert scanner.done
    assert belongs.count(True) == len(text)


@given(st.text(alphabet='{}[]",:\\ 0123-.eEtrufalsn', max_size=12))
def test_scanner_takes_what_json_takes(text: str) -> None:
    scanner = JsonScanner()
    try:
        used = 0
        for character in text + " ":
            if scanner.done:
                break
            used += scanner.push(character)
        accepts = scanner.done and not text[used:].strip()
    except MalformedJson:
        accepts = False
    try:
        json.loads(text)
        is_json = True
    except ValueError:
        is_json = False
    assert accepts == is_json


def test_reasoning_pieces_stream() -> None:
    pieces = pieces_of(["<thi", "nk>a", "b</th", "ink>", "\nc"], AnswerSyntax(reasons=True))
    assert pieces == [Reasoning("a"), Reasoning("b"), Content("c")]
