"""Server-sent events and chunks from bytes that may be cut anywhere."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixd.client import errors
from prefixd.client.streams import ChunkReader, ServerEvent, SseDecoder
from prefixd.client.types import CompletionChunk
from tests.clients.samples import TEXT_CHUNKS, TEXT_EVENTS

STREAM = (
    "\ufeff: a comment\r\n"
    "data: first\n\n"
    'event: usage\rdata: {"Zürich": "🦊"}\r\rdata\r\n'
    "data:two\ndata:  lines\n\n"
    "id: 7\nretry: 10\n\n"
    "data: [DONE]\r\n\r\n"
    "data: cut off"
).encode()
EVENTS = [
    ServerEvent("message", "first"),
    ServerEvent("usage", '{"Zürich": "🦊"}'),
    ServerEvent("message", "\ntwo\n lines"),
    ServerEvent("message", "[DONE]"),
]


def _decode(pieces: list[bytes]) -> list[ServerEvent]:
    decoder = SseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def test_decoder_follows_the_html_standard():
    assert _decode([STREAM]) == EVENTS


def test_single_bytes_decode_to_the_same_events():
    assert _decode([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_do_not_depend_on_where_the_stream_is_cut(cuts: list[int]):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert _decode([STREAM[a:b] for a, b in itertools.pairwise(edges)]) == EVENTS


@given(st.binary(max_size=200), st.integers(0, 200))
def test_arbitrary_bytes_decode_the_same_in_two_pieces(data: bytes, cut: int):
    assert _decode([data[:cut], data[cut:]]) == _decode([data])


def test_event_is_returned_at_the_cr_of_its_empty_line():
    decoder = SseDecoder()
    assert decoder.feed(b"data: x\r") == []
    assert decoder.feed(b"\r") == [ServerEvent("message", "x")]
    assert decoder.feed(b"\n") == []


# ── Chunks ─────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, len(TEXT_EVENTS))))
def test_chunks_do_not_depend_on_where_the_bytes_are_cut(cuts: list[int]):
    reader = ChunkReader()
    edges = [0, *sorted(cuts), len(TEXT_EVENTS)]
    chunks = [
        chunk
        for start, end in itertools.pairwise(edges)
        for chunk in reader.feed(TEXT_EVENTS[start:end])
    ]
    reader.finish()
    assert chunks == TEXT_CHUNKS


@given(st.lists(st.integers(0, 10_000)))
def test_chunks_before_a_stream_error_are_returned_for_any_cut(cuts: list[int]):
    text = b'data: {"choices":[{"index":0,"text":"so far"}]}\n\n'
    events = text + b'data: {"error":{"message":"the row failed"}}\n\n'
    reader = ChunkReader()
    edges = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    pieces = (events[start:end] for start, end in itertools.pairwise(edges))
    chunks = itertools.chain.from_iterable(map(reader.feed, pieces))
    assert next(chunks) == CompletionChunk(text="so far", index=0)
    with pytest.raises(errors.ServerError, match="the row failed"):
        next(chunks)


def test_chat_delta_without_content_has_empty_text():
    reader = ChunkReader()
    events = (
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
        b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
    )
    assert list(reader.feed(events)) == [
        CompletionChunk(text="", index=0),
        CompletionChunk(text="Hi", index=0),
    ]


def test_stream_without_its_closing_event_raises_interrupted():
    reader = ChunkReader()
    assert list(reader.feed(b'data: {"choices":[]}\n\n')) == []
    with pytest.raises(errors.StreamInterruptedError):
        reader.finish()


def test_error_event_raises_server_error_with_request_id():
    reader = ChunkReader()
    with pytest.raises(errors.ServerError, match="the row failed") as caught:
        list(reader.feed(b'data: {"error":{"message":"the row failed","request_id":"r2"}}\n\n'))
    assert caught.value.request_id == "r2"


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("shutting_down", errors.UnavailableError, 503),
        ("overloaded", errors.UnavailableError, 503),
        ("deadline_exceeded", errors.DeadlineError, 504),
        ("storage_full", errors.StorageFullError, 507),
        ("engine_error", errors.ServerError, 500),
        (None, errors.ServerError, 500),
    ],
)
def test_error_event_raises_the_error_class_of_its_code(
    code: str | None, kind: type[errors.ApiError], status: int
):
    event = json.dumps({"error": {"message": "the server is shutting down", "code": code}})
    reader = ChunkReader()
    assert list(reader.feed(b'data: {"choices":[{"index":0,"text":"so far"}]}\n\n'))
    with pytest.raises(kind, match=r"^the server is shutting down$") as caught:
        list(reader.feed(f"data: {event}\n\ndata: [DONE]\n\n".encode()))
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code) == (status, code)


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [{"index": 0}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"index": 0, "delta": "a"}]},
        {"choices": {}},
        {"error": "failed"},
        {"error": {"code": "engine_error"}},
    ],
)
def test_malformed_event_raises_protocol_error(event: object):
    with pytest.raises(errors.ProtocolError):
        list(ChunkReader().feed(f"data: {json.dumps(event)}\n\n".encode()))


def test_event_without_choices_raises_protocol_error():
    with pytest.raises(errors.ProtocolError, match="choices"):
        list(ChunkReader().feed(b'data: {"hello":1}\n\n'))
