"""Bounds of texts that a schema leaves endless: fractions of a second."""

import json
from typing import Any

LONGEST = {
    "time": len("12:30:00.123456789+00:00"),
    "date-time": len("2020-01-31T12:30:00.123456789+00:00"),
}
"""Characters of a format with nine digits of a second's fraction. Without an end to them, small
models write digits until they are cut."""

_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_VALUES = frozenset(("const", "default", "enum", "example", "examples"))
_OWN_BOUNDS = frozenset(("const", "enum", "maxLength", "minLength"))


def with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON Schema in which a text of a format of LONGEST has a ``maxLength``, where the
    schema does not say how long it is."""
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
        if longest is not None and not each.keys() & _OWN_BOUNDS:
            each["maxLength"] = longest
    return whole
