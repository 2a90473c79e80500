"""Streamed generations: bytes, cut anywhere, to server-sent events and their chunks. No I/O."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from prefixd.client.errors import BY_CODE, ProtocolError, StreamInterruptedError
from prefixd.client.types import CompletionChunk, NullIsDefault, ResponseModel, Usage
from prefixd.client.wire import ErrorDetails, parse_json

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LAST_EVENT = "[DONE]"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event: its type (``message`` by default) and its data lines joined by newlines."""

    type: str
    data: str


class SseDecoder:
    """Incremental decoder: ``feed`` bytes, get the events they complete.

    Lines end in LF, CR or CRLF; an event ends at an empty line; comments and unknown fields are
    skipped, as the WHATWG HTML standard (section 9.2.6) says. An event without its empty line at
    the end of the stream is dropped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._at_start = True
        self._type = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events completed by ``chunk``, in order."""
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a CRLF whose CR already ended the line
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> ServerEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        event_type, data = self._type or "message", self._data
        self._type, self._data = "", []
        return ServerEvent(type=event_type, data="\n".join(data)) if data else None


class _Event(ResponseModel):
    """An event's JSON: choices (both endpoints), or an error."""

    choices: tuple[CompletionChunk, ...] | None = None
    usage: Usage | None = None
    error: ErrorDetails | None = None
    warnings: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()


class ChunkReader:
    """Incremental reader: ``feed`` bytes for the chunks they complete, then ``finish``.

    ``feed`` raises ``ApiError`` when the server reports a failure during the stream; ``finish``
    raises ``StreamInterruptedError`` when the closing event never came. ``warnings`` are those of
    the response, which come with its first chunk.
    """

    def __init__(self) -> None:
        self._events = SseDecoder()
        self.done = False
        self.warnings: tuple[str, ...] = ()

    def feed(self, data: bytes) -> Iterator[CompletionChunk]:
        """The chunks completed by ``data``, those before a failure included; nothing after the
        closing event."""
        for event in self._events.feed(data):
            if event.data == _LAST_EVENT:
                self.done = True
            if self.done:
                break
            yield from self._chunks(event.data)

    def finish(self) -> None:
        """Check, at the end of the bytes, that the closing event came."""
        if not self.done:
            raise StreamInterruptedError("the stream ended before its closing event")

    def _chunks(self, data: str) -> Iterator[CompletionChunk]:
        event = parse_json(_Event, data)
        if event.error is not None:
            # The status line was sent as 200 before the failure, so the code decides.
            raise event.error.to_error(BY_CODE.get(event.error.code or "", 500))
        if event.choices is None:
            raise ProtocolError(f"expected choices in a stream's event, got {data!r:.80}")
        self.warnings += event.warnings
        yield from event.choices
        if event.usage is not None:
            yield CompletionChunk(text="", index=0, usage=event.usage)
