"""Bounds of what a schema leaves endless: fractions of a second, and of numbers in a range.

Without an end to them, small models write digits until they are cut.
"""

import json
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

_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_VALUES = frozenset(("const", "default", "enum", "example", "examples"))
_OWN_LENGTH = frozenset(("const", "enum", "maxLength", "minLength"))
_OWN_VALUES = frozenset(("const", "enum", "multipleOf"))


def with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON Schema in which a text of a format of LONGEST has a ``maxLength``, where the
    schema does not say how long it is, and a number in a range is a ``multipleOf`` FINEST, where it
    does not say of what."""
    whole: dict[str, Any] = json.loads(json.dumps(schema))
    todo: list[Any] = [whole]
    while todo:
        each = todo.pop()
        if isinstance(each, list):
            todo += each
        if not isinstance(each, dict):
            continue
        for name, value in each.items():
            if name in _BY_NAME and isinstance(value, dict):
                todo += value.values()
            elif name not in _VALUES:
                todo.append(value)
        longest = LONGEST.get(each["format"]) if isinstance(each.get("format"), str) else None
        if longest is not None and not each.keys() & _OWN_LENGTH:
            each["maxLength"] = longest
        if _is_fraction_in_a_range(each) and not each.keys() & _OWN_VALUES:
            each["multipleOf"] = FINEST
    return whole


def _is_fraction_in_a_range(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type")
    if kinds != "number" and not (isinstance(kinds, list) and "number" in kinds):
        return False
    lowest = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    highest = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    if not lowest or not highest or not all(map(_is_number, (*lowest, *highest))):
        return False
    return bool(min(highest) - max(lowest) >= _NARROWEST)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
