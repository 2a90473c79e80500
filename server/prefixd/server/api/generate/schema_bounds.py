"""Bounds of what a schema leaves endless: fractions of a second, and of numbers in a range.

Without an end to them, small models write digits until they are cut. They are put only where one
schema alone describes a value: next to others (``allOf``, ``$ref``, several patterns of a name), a
bound could exclude what those require.
"""

import json
from collections.abc import Iterator
from typing import Any

LONGEST = {
    "time": len("12:30:00.123456789+00:00"),
    "date-time": len("2020-01-31T12:30:00.123456789+00:00"),
}
"""Characters of a format with nine digits of a second's fraction."""

FINEST = 1e-9
"""Numbers in a range are multiples of it."""

_NARROWEST = 1e-6
"""The width of a range, from which on it has enough multiples of FINEST."""

_LARGEST = 32 * 1024
"""Bytes of a schema; with bounds, a larger one could exceed what a grammar may have."""

_NOTES = frozenset(("title", "description", "default", "examples", "example", "$comment"))
_RANGE = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
_OBJECT = frozenset(
    ("type", "properties", "required", "additionalProperties", "minProperties", "maxProperties")
)
_ARRAY = frozenset(("type", "items", "prefixItems", "additionalItems", "minItems", "maxItems"))
_ROOT = frozenset(("$schema", "$id", "$defs", "definitions"))


def with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON Schema in which a text of a format of LONGEST has a ``maxLength``, and a
    number in a range is a ``multipleOf`` FINEST, where the schema says nothing else of it."""
    text = json.dumps(schema)
    whole: dict[str, Any] = json.loads(text)
    todo: list[Any] = [whole] if len(text) <= _LARGEST else []
    while todo:
        each = todo.pop()
        if not isinstance(each, dict):
            continue
        if each.keys() - _NOTES == {"type", "format"}:
            longest = LONGEST.get(each["format"]) if isinstance(each["format"], str) else None
            if longest is not None:
                each["maxLength"] = longest
        elif _is_fraction_in_a_range(each):
            each["multipleOf"] = FINEST
        else:
            todo += _alone(each)
    return whole


def _alone(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas right inside of one that alone describe their values."""
    keywords = schema.keys() - _NOTES - _ROOT
    if keywords in ({"anyOf"}, {"oneOf"}):
        yield from _listed(schema[keywords.pop()])
    elif keywords <= _OBJECT:
        yield from _named(schema.get("properties"))
        yield schema.get("additionalProperties")
    elif keywords <= _OBJECT - {"properties"} | {"patternProperties"}:
        patterns = _named(schema.get("patternProperties"))
        yield from patterns if len(patterns) == 1 else ()
        yield schema.get("additionalProperties")
    elif keywords <= _ARRAY:
        for name in ("items", "prefixItems"):
            yield from _listed(schema.get(name))
        yield schema.get("additionalItems")


def _named(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_fraction_in_a_range(schema: dict[str, Any]) -> bool:
    keywords, kinds = schema.keys() - _NOTES, schema.get("type")
    if not keywords - {"type"} <= _RANGE:
        return False
    if kinds != "number" and not (isinstance(kinds, list) and "number" in kinds):
        return False
    lowest = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    highest = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    if not lowest or not highest or not all(map(_is_number, (*lowest, *highest))):
        return False
    try:
        return bool(min(highest) - max(lowest) >= _NARROWEST)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
