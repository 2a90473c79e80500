"""Event streams parse alike however their bytes are cut."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from prefixd.client.streams import ServerEvent, SseDecoder

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


def test_the_standard_in_one_stream():
    assert _decode([STREAM]) == EVENTS


def test_byte_by_byte():
    assert _decode([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM))))
def test_any_cut_parses_alike(cuts: list[int]):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert _decode([STREAM[a:b] for a, b in itertools.pairwise(edges)]) == EVENTS


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_parse_alike_in_two_pieces(data: bytes, cut: int):
    assert _decode([data[:cut], data[cut:]]) == _decode([data])


def test_an_event_is_given_as_soon_as_its_empty_line_ends():
    decoder = SseDecoder()
    assert decoder.feed(b"data: x\r") == []
    assert decoder.feed(b"\r") == [ServerEvent("message", "x")]
    assert decoder.feed(b"\n") == []
