"""What the errors of pydantic are called in a response: what was expected and received, and where.

None of the library's own sentences is passed on. A kind of error that is not listed here is one of
ours (``PydanticCustomError``), whose message says what was expected.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefixd.server.errors import BadRequest

_EXPECTED = {
    "string_type": "a text",
    "string_unicode": "a text in Unicode",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of fewer digits",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "invalid_key": "texts as keys",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "recursion_loop": "less deeply nested values",
    "recursion_depth_exceeded": "less deeply nested values",
}
"""What was expected, by the kind of error and its values."""

_CODES = {
    "json_invalid": "invalid_json",
    "extra_forbidden": "unknown_field",
    "unsupported": "unsupported_field",
    "unsupported_at": "unsupported_field",
}
"""Codes of validation errors that have one of their own."""

_PLACE = re.compile(r"at (line \d+) (column \d+)$")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_SHOWN_KINDS = frozenset(
    {
        "literal_error",
        "unexpected_word",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
    }
)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """The first of pydantic's errors as one sentence: what was expected and what was received."""
    first = errors[0]
    names = [part for part in first["loc"] if part not in {"body", "query", "path", "header"}]
    if names and names[-1] == "[key]":
        names = names[:-2]  # the key is the caller's, as any value is
    param = _path_of(names)[:200]
    field = f"'{param.encode('ascii', 'backslashreplace').decode()}'"
    kind, said = first["type"], first["msg"]
    match kind:
        case "json_invalid":
            message, param = _bad_json(said), ""
        case "missing":
            message = f"{field} is required" if names else "expected a body; received none"
        case "extra_forbidden":
            message = f"unknown field {field}"
        case "unsupported" | "named":
            message, param = said, first["ctx"]["name"]
        case "refused" | "unsupported_at":
            message = f"{field}: {said}"
        case "value_error":
            message = said.removeprefix("Value error, ")
        case _:
            subject = field if names else "the body"
            received = described(first.get("input"), show_word=kind in _SHOWN_KINDS)
            message = f"{subject}: expected {expected(first)}; received {received}"
    return BadRequest(message, code=_CODES.get(kind, BadRequest.default_code), param=param or None)


def expected(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors expected."""
    words = _EXPECTED.get(error["type"])
    if words is None:
        said: str = error["msg"]
        return said
    context = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in error.get("ctx", {}).items()
    }
    said = words.format_map(context)
    one = 1 in {context.get("min_length"), context.get("max_length")}
    return said.replace("characters", "character").replace("entries", "entry") if one else said


def described(value: object, *, show_word: bool = False) -> str:
    """A received value, without repeating a prompt: text is shown only where one of a few fixed
    words was expected, or where it was read as a number."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return str(value).lower()[:32]
        case str() if show_word and _WORD.fullmatch(value):
            return f"'{value}'"
        case str():
            return f"a string of {len(value)} characters"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _bad_json(said: str) -> str:
    place = _PLACE.search(said)
    where = "" if place is None else f" at {place[1]}, {place[2]}"
    return f"expected a body of valid JSON; what was received is not, or ends too early{where}"


def _path_of(parts: Sequence[int | str]) -> str:
    """``messages[2].content``: the place of a value in a body."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
