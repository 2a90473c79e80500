"""The part of JSON Schema that can be enforced, and the bounds of a grammar's text.

A keyword outside of it is refused by name and place: an answer that ends validates against the
whole schema.
"""

import json
from collections.abc import Iterator
from math import isfinite
from typing import Any

from prefixd.server.engine.constraint import Grammar, GrammarKind, GrammarRefused

MAX_BYTES = 64 * 1024
"""Of the text of a grammar."""

MAX_DEPTH = 100
"""Of the JSON of a schema: lists and objects in one another."""

MAX_PATTERN_BYTES = 4096
MAX_MULTIPLE = 10_000
"""Of ``multipleOf``: a matcher has a state for each remainder."""

MAX_LENGTH = 65_536
"""Of numbers that count characters, items or properties."""

_ONE = ("additionalProperties", "additionalItems", "items")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_OTHERS = (
    *("type", "enum", "const", "$ref", "format", "pattern", "required", "multipleOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
)
KEYWORDS = frozenset((*_ONE, *_MANY, *_NAMED, *_COUNTS, *_OTHERS))
"""Keywords that are enforced."""

ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "example", "deprecated", "nullable"),
        *("readOnly", "writeOnly", "$comment", "$schema", "$id", "$anchor", "discriminator"),
        *("contentEncoding", "contentMediaType", "strict", "name"),
    )
)
"""Keywords that are ignored: they do not change which values are valid."""


def check_grammar(grammar: Grammar) -> None:
    """Raises GrammarRefused for a grammar that is too large, and a schema outside the subset."""
    size = len(grammar.source.encode())
    if size > MAX_BYTES:
        raise GrammarRefused(f"expected a grammar of at most {MAX_BYTES} bytes; received {size}")
    if grammar.kind is GrammarKind.REGEX and size > MAX_PATTERN_BYTES:
        raise GrammarRefused(f"expected at most {MAX_PATTERN_BYTES} bytes; received {size}")
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        _check_text(grammar.source, "$")
    for place, text in grammar.schemas:
        _check_text(text, place)


def _check_text(text: str, path: str) -> None:
    schema = json.loads(text)
    if _is_deeper(schema, MAX_DEPTH):
        raise GrammarRefused(f"expected at most {MAX_DEPTH} lists and objects in one another")
    _check_schema(schema, path)


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def subschemas(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas right inside of a schema that are objects, and where they are."""
    for where, inner in _inside(schema, path):
        if isinstance(inner, dict):
            yield where, inner


def _inside(schema: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in schema.items():
        where = f"{path}.{name}"
        if name in _NAMED and isinstance(value, dict):
            yield from ((f"{where}.{key}", inner) for key, inner in value.items())
        elif name in (*_MANY, "items") and isinstance(value, list):
            yield from ((f"{where}[{index}]", inner) for index, inner in enumerate(value))
        elif name in _ONE:
            yield where, value


def _check_schema(schema: Any, path: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise GrammarRefused(f"at {path}: expected a schema, which is an object or a boolean")
    for name, value in schema.items():
        if name in KEYWORDS:
            _check_value(name, value, path)
        elif name not in ANNOTATIONS and (not name.startswith("x-") or name == "x-guidance"):
            raise GrammarRefused(f"at {path}: the keyword '{name}' is not supported")
    for where, inner in _inside(schema, path):
        _check_schema(inner, where)


def _check_value(name: str, value: Any, path: str) -> None:
    """What llguidance would misread or compute for too long."""
    expected = None
    if name in _COUNTS:
        if not _is_number(value) or value != int(value) or not 0 <= value <= MAX_LENGTH:
            expected = f"a whole number from 0 to {MAX_LENGTH}"
    elif name == "multipleOf":
        if not _is_number(value) or not 0 < value <= MAX_MULTIPLE:
            expected = f"a number above 0, up to {MAX_MULTIPLE}"
    elif name == "pattern":
        if not isinstance(value, str) or len(value.encode()) > MAX_PATTERN_BYTES:
            expected = f"a text of at most {MAX_PATTERN_BYTES} bytes"
    elif name in _NAMED:
        if not isinstance(value, dict):
            expected = "an object"
    elif name in _MANY and not isinstance(value, list):
        expected = "a list"
    if expected is not None:
        raise GrammarRefused(f"at {path}.{name}: expected {expected}")


def _is_number(value: Any) -> bool:
    # JSON's 1e999 is infinite in Python.
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
