"""HTTP requests and responses as plain data, and the parsing of responses. No I/O."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Generic, TypedDict, TypeVar
from urllib.parse import quote
from uuid import uuid4

from pydantic import ValidationError

from prefixd.client.errors import ApiError, FormatError, ProtocolError, error_class
from prefixd.client.types import Member, PrefixUsed, ResponseModel

T = TypeVar("T")
M = TypeVar("M", bound=ResponseModel)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a multipart body. A ``Path`` is opened when the request is sent, and streamed."""

    name: str
    filename: str
    content: bytes | Path
    content_type: str


Progress = Callable[[int, int], None]
"""Called while a body is sent, with the bytes sent so far and their total. A retry begins at 0."""


class Repeat(Enum):
    """Whether a request may be sent again, by what has become of it before."""

    REFUSED = "if the server has not begun it"
    UNANSWERED = "also if no answer was returned: a generation, which changes nothing"
    LOST = "also if it may have been executed: one that reads, or that has an idempotency key"


@dataclass(frozen=True, slots=True)
class Request:
    """What to send, relative to the server's URL. ``json``, ``ndjson``, ``octets`` and ``parts``
    exclude each other. ``octets`` are bytes, or a file that is read when the request is sent. The
    ``headers`` are the same when the request is sent again."""

    method: str
    path: str
    params: Mapping[str, str | int | tuple[str, ...]]
    json: Mapping[str, object] | None = None
    parts: tuple[Part, ...] = ()
    ndjson: bytes | None = None
    octets: bytes | Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeat: Repeat = Repeat.REFUSED
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """A response whose body has been read; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request and the parser of its response; ``parse`` raises ``ApiError`` for an error
    response."""

    request: Request
    parse: Callable[[Response], T]


@dataclass(frozen=True, slots=True)
class StreamCall:
    """A request whose response is a stream of server-sent events."""

    request: Request


def request_of(
    method: str,
    *path: str,
    params: Mapping[str, str | int | tuple[str, ...] | None] | None = None,
    json: Mapping[str, object] | None = None,
    parts: tuple[Part, ...] = (),
    ndjson: bytes | None = None,
    octets: bytes | Path | None = None,
    repeat: Repeat = Repeat.REFUSED,
) -> Request:
    """A request; each of ``path`` is one segment, ``params`` of None are omitted. One that reads
    may be sent again in any case."""
    # A name with a slash or a question mark must stay one segment: the server then refuses it.
    with encoded_text():
        joined = "/" + "/".join(quote(segment, safe="@:") for segment in path)
    query = {name: value for name, value in (params or {}).items() if value is not None}
    return Request(
        method=method,
        path=joined,
        params=query,
        json=json,
        parts=parts,
        ndjson=ndjson,
        octets=octets,
        repeat=Repeat.LOST if method == "GET" else repeat,
    )


class Preconditions(TypedDict, total=False):
    """``if_match``: only if the resource still has this ETag, as a response gave it, or exists
    (``"*"``). ``if_none_match="*"``: only if it does not exist. Otherwise
    ``PreconditionFailedError``."""

    if_match: str | None
    if_none_match: str | None


_HEADERS = {"if_match": "if-match", "if_none_match": "if-none-match"}


def guarded(call: Call[T], conditions: Preconditions) -> Call[T]:
    """The call with the headers of its preconditions. TypeError for any other keyword."""
    for name in conditions:
        if name not in _HEADERS:  # without its condition the call would be executed in any case
            raise TypeError(
                f"unexpected keyword argument {name!r}: the call has no parameter of this name, "
                f"and its preconditions are {' and '.join(_HEADERS)}"
            )
    headers = {_HEADERS[name]: str(tag) for name, tag in conditions.items() if tag is not None}
    return replace(call, request=replace(call.request, headers=headers))


def creating(
    call: Call[T], conditions: Preconditions | None = None, *, repeat: Repeat = Repeat.LOST
) -> Call[T]:
    """The call with its preconditions and a fresh key, under which the server executes it once,
    however often the client sends it."""
    sent = guarded(call, conditions or {})
    headers = {**sent.request.headers, "idempotency-key": uuid4().hex}
    return replace(sent, request=replace(sent.request, headers=headers, repeat=repeat))


def reporting(call: Call[T], progress: Progress | None) -> Call[T]:
    """The call that tells ``progress`` how much of its body was sent."""
    return replace(call, request=replace(call.request, progress=progress))


@contextmanager
def encoded_text() -> Iterator[None]:
    """Raise ``FormatError`` for a text that cannot be sent: Python keeps bytes of arguments and
    names of files that are not UTF-8 as lone surrogates."""
    try:
        yield
    except UnicodeEncodeError as error:
        received = error.object[max(0, error.start - 20) : error.start + 1]
        raise FormatError(
            f"expected text that {error.encoding} encodes; the last character of {received!a} is "
            "none"
        ) from None


def dump(value: Mapping[str, object]) -> bytes:
    """Compact JSON in UTF-8. ``FormatError`` for a text with a lone surrogate."""
    with encoded_text():
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


# ── Responses ────────────────────────────────────────────────────────────────────────────────


def parse_json(model: type[M], body: str | bytes) -> M:
    """The JSON object in ``body`` as a ``model``.

    ``ProtocolError`` for anything else; its message gives the field, what was expected
    and the received value.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise ProtocolError(_mismatch(error, body)) from None


def _mismatch(error: ValidationError, body: str | bytes) -> str:
    """The first mismatch as a sentence. Never the whole object: a key's secret may be in it."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        text = body if isinstance(body, str) else body.decode("utf-8", errors="replace")
        return f"expected JSON, the server sent {text[:80]!r}{'…' if len(text) > 80 else ''}"
    if not first["loc"]:
        return f"expected a JSON object, the server sent {first['input']!r:.80}"
    field = ".".join(str(key) for key in first["loc"])
    if first["type"] == "missing":
        return f"expected the field {field!r}, the server did not send it"
    # pydantic's messages begin with what they are about: "Input should be a valid integer".
    _, _, rule = first["msg"].partition(" ")
    return f"the field {field!r} {rule}, the server sent {first['input']!r:.80}"


def accepted(response: Response) -> Response:
    """The response if its status is 2xx; else raises ``ApiError`` or ``ProtocolError``."""
    if response.status >= 400:
        raise error_of(response)
    if response.status >= 300:
        raise ProtocolError(f"expected a response, the server redirects ({response.status})")
    return response


def parse_body(model: type[M], response: Response) -> M:
    """The body of a 2xx response as a ``model``; raises as ``accepted`` and ``parse_json`` do."""
    body = parse_json(model, accepted(response).body)
    etag = response.headers.get("etag")
    return body.model_copy(update={"etag": etag}) if etag and "etag" in model.model_fields else body


def no_content(response: Response) -> None:
    """Nothing, for a 2xx response; raises as ``accepted`` does."""
    accepted(response)


def parser(model: type[M]) -> Callable[[Response], M]:
    """``parse_body`` for one model."""
    return partial(parse_body, model)


# ── Errors ───────────────────────────────────────────────────────────────────────────────────


class ErrorDetails(ResponseModel):
    """The OpenAI-shaped error object."""

    message: str
    code: str | None = None
    type: str | None = None
    param: str | None = None
    request_id: str | None = None

    def to_error(self, status: int) -> ApiError:
        """The error for this object under an HTTP status."""
        return error_class(status)(status=status, **self.model_dump())


class _ErrorBody(ResponseModel):
    error: ErrorDetails


def error_of(response: Response) -> ApiError:
    """The error for a response of status 400 or more."""
    try:
        error = parse_json(_ErrorBody, response.body).error.to_error(response.status)
    except ProtocolError:  # a proxy's page, not the server's JSON: the status is still known
        message = f"the server responded {response.status} without an error message"
        error = error_class(response.status)(message, status=response.status)
    error.request_id = error.request_id or response.headers.get("x-request-id")
    error.retry_after = _seconds(response.headers.get("retry-after"))
    return error


def _seconds(value: str | None) -> float | None:
    """Seconds of a ``Retry-After``. None for what is no time to wait, and for a date: our server
    sends seconds."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def prefix_used(headers: Mapping[str, str]) -> PrefixUsed | None:
    """The prefix named by a generation's headers; None for the bare base."""
    reference, digest = headers.get("x-prefixd-prefix"), headers.get("x-prefixd-prefix-digest")
    if not reference or not digest:
        return None
    chosen_by = headers.get("x-prefixd-prefix-chosen-by")
    if chosen_by == "prefix":
        members = tuple(Member(reference=each) for each in reference.split(","))
        return PrefixUsed(digest=digest, chosen_by=chosen_by, members=members)
    name, _, version = reference.rpartition("@")
    if not name or not version.isdecimal():
        raise ProtocolError(f"expected x-prefixd-prefix to be name@version, not {reference!r}")
    return PrefixUsed(name=name, version=int(version), digest=digest, chosen_by=chosen_by)
