"""Reading JSON that another program wrote: every field is checked once, here."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TypeVar

from prefixd.client.errors import ProtocolError

T = TypeVar("T")


def load_object(body: str | bytes) -> Mapping[str, object]:
    """The JSON object in ``body``. ``ProtocolError`` when it is anything else."""
    try:
        value: object = json.loads(body)
    except ValueError:
        raise ProtocolError(f"expected JSON, the server sent {_shown(body)}") from None
    return as_object(value)


def as_object(value: object) -> Mapping[str, object]:
    """``value`` as a JSON object."""
    if not isinstance(value, dict):
        raise ProtocolError(f"expected a JSON object, the server sent {_shown(repr(value))}")
    return value


def read(source: Mapping[str, object], key: str, kind: type[T]) -> T:
    """The field ``key``, which must be there and of ``kind`` (an int passes for a float)."""
    value = source.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError(
            f"expected the field {key!r} to be {kind.__name__}, the server sent {value!r:.80}"
        )
    return value


def maybe(source: Mapping[str, object], key: str, kind: type[T]) -> T | None:
    """The field ``key``, or None where it is null or absent."""
    return None if source.get(key) is None else read(source, key, kind)


def objects(source: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    """The field ``key`` as a list of objects."""
    values: list[object] = read(source, key, list)
    return [as_object(value) for value in values]


def strings(source: Mapping[str, object], key: str) -> tuple[str, ...]:
    """The field ``key`` as strings; absent or null is empty."""
    values: list[object] = maybe(source, key, list) or []
    return tuple(str(value) for value in values)


def moment(source: Mapping[str, object], key: str) -> datetime:
    """The field ``key`` as a time with its offset (ISO 8601)."""
    text = read(source, key, str)
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise ProtocolError(f"expected {key!r} to be a time, the server sent {text!r}") from None
    if parsed.tzinfo is None:
        raise ProtocolError(f"expected {key!r} with an offset from UTC, the server sent {text!r}")
    return parsed


def _shown(body: str | bytes) -> str:
    text = body if isinstance(body, str) else body.decode("utf-8", errors="replace")
    return repr(text[:80] + ("…" if len(text) > 80 else ""))
