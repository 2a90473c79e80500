"""Reading a streamed generation: bytes to chunks, whatever way the bytes are cut."""

from collections.abc import Callable, Iterator, Mapping

from prefixd.client.answers import described
from prefixd.client.errors import BY_CODE, ProtocolError, StreamInterruptedError
from prefixd.client.sse import SseDecoder
from prefixd.client.types import CompletionChunk, Usage
from prefixd.client.wire import as_object, load_object, maybe, objects, read

ChoiceParser = Callable[[Mapping[str, object]], CompletionChunk]
_LAST_EVENT = "[DONE]"


def text_piece(choice: Mapping[str, object]) -> CompletionChunk:
    """A choice of a ``/v1/completions`` event."""
    return _piece(choice, maybe(choice, "text", str))


def chat_piece(choice: Mapping[str, object]) -> CompletionChunk:
    """A choice of a ``/v1/chat/completions`` event; the role's announcement has no text."""
    return _piece(choice, maybe(as_object(choice.get("delta")), "content", str))


def _piece(choice: Mapping[str, object], text: str | None) -> CompletionChunk:
    return CompletionChunk(
        text=text or "",
        index=read(choice, "index", int),
        finish_reason=maybe(choice, "finish_reason", str),
    )


class ChunkReader:
    """Incremental reader: ``feed`` bytes for the chunks they complete, then ``finish``.

    ``feed`` raises ``ApiError`` when the server reports a failure in mid-stream; ``finish`` raises
    ``StreamInterruptedError`` when the closing event never came.
    """

    def __init__(self, parse: ChoiceParser) -> None:
        self._parse = parse
        self._events = SseDecoder()
        self.done = False

    def feed(self, data: bytes) -> Iterator[CompletionChunk]:
        """The chunks completed by ``data``, those before a failure included; nothing after the
        closing event."""
        for event in self._events.feed(data):
            if event.data == _LAST_EVENT:
                self.done = True
            if self.done:
                break
            yield from self._read(event.data)

    def finish(self) -> None:
        """The bytes have ended: check that the stream had, too."""
        if not self.done:
            raise StreamInterruptedError("the stream ended before its closing event")

    def _read(self, data: str) -> list[CompletionChunk]:
        body = load_object(data)
        if (error := body.get("error")) is not None:
            # The status line went out as 200 long ago: the failure is the server's.
            refusal = as_object(error)
            raise described(refusal, status=BY_CODE.get(maybe(refusal, "code", str) or "", 500))
        if "choices" not in body:
            raise ProtocolError(f"expected choices in a stream's event, got {data!r:.80}")
        chunks = [self._parse(choice) for choice in objects(body, "choices")]
        if (usage := body.get("usage")) is not None:
            chunks.append(CompletionChunk(text="", usage=Usage.from_wire(as_object(usage))))
        return chunks
