"""JSON from strangers: one meaning or none.

The standard parser lets a later duplicate key win, takes NaN and Infinity, and keeps lone
surrogates that no encoder downstream can write. Each of these is a way for two readers to see two
different documents.
"""

import json
import math
from typing import Any

from prefixd.store.errors import quoted

MAX_DEPTH = 16
"""Deepest nesting accepted: PEFT configs nest three deep."""


class StrictJsonError(ValueError):
    """The bytes are not JSON as understood here; the message says why."""


def parse_object(raw: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse a JSON object (UTF-8) strictly; raise StrictJsonError.

    The caller caps the size. Refused are: a byte order mark, duplicate keys, NaN and Infinity
    (also by overflow, as 1e999), lone surrogates, and nesting deeper than ``max_depth``.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise StrictJsonError("nested too deep") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"{error.msg} at character {error.pos}") from None
    except StrictJsonError:
        raise
    except ValueError:  # an integer of thousands of digits: the interpreter's own limit
        raise StrictJsonError("a number has too many digits") from None
    if not isinstance(value, dict):
        raise StrictJsonError(f"expected an object, got {kind_of(value)}")
    _check(value, levels=max_depth)
    return value


def canonical(value: dict[str, Any]) -> bytes:
    """The one spelling of a parsed object: sorted keys, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def kind_of(value: object) -> str:
    """What JSON calls this value, for messages."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


def shown(value: object) -> str:
    """A JSON value from a stranger, for messages: scalars cut short, the rest by kind."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    # Not str() of any integer: past 4300 digits that raises.
    if isinstance(value, int) and abs(value) < 2**64:
        return str(value)
    return kind_of(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"duplicate key {quoted(key)}")
        result[key] = value
    return result


def _constant(name: str) -> float:
    raise StrictJsonError(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError("a number is too large for a float")
    return value


def _check(value: object, *, levels: int) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise StrictJsonError(f"a lone surrogate in {quoted(value)}") from None
    elif isinstance(value, dict | list):
        if levels == 0:
            raise StrictJsonError("nested too deep")
        for item in value:
            _check(item, levels=levels - 1)
        for item in value.values() if isinstance(value, dict) else ():
            _check(item, levels=levels - 1)
