"""What a response writes to its socket at once."""

import asyncio
import json
from asyncio import selector_events
from typing import Any

import pytest

from tests.api.api_world import World
from tests.serve.listening import Listening, serve


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the server wrote, one entry for each call of the event loop's transport."""
    seen: list[bytes] = []
    transport = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
    write = transport.write

    def recorded(self: Any, data: bytes) -> None:
        seen.append(bytes(data))
        write(self, data)

    monkeypatch.setattr(transport, "write", recorded)
    return seen


def request(world: World, **fields: Any) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 3, **fields}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n"
        % (world.keys["acme"].encode(), len(body))
    ) + body


async def until_answered(reader: asyncio.StreamReader) -> None:
    """Read one response to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"chunked" in head:
        await reader.readuntil(b"0\r\n\r\n")
    else:
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))


def answered(writes: list[bytes]) -> list[bytes]:
    return [data for data in writes if not data.startswith(b"POST ")]


@pytest.mark.parametrize(
    ("fields", "begin"),
    [
        ({"stream": True}, b"data: "),
        ({}, b'"choices"'),
        ({"model": "none"}, b'"model_not_found"'),
    ],
)
def test_the_head_and_the_first_part_of_a_body_are_one_write(
    world: World, writes: list[bytes], fields: dict[str, Any], begin: bytes
) -> None:
    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(2):  # on one connection: what the first kept is not written by the second
            writes.clear()
            writer.write(request(world, **fields))
            await until_answered(reader)
            first = answered(writes)[0]
            assert first.startswith(b"HTTP/1.1 ")
            assert begin in first
            assert sum(data.startswith(b"HTTP/1.1 ") for data in writes) == 1
        writer.close()

    serve(world, scenario)


def test_a_head_without_a_body_is_sent_at_the_end(world: World, writes: list[bytes]) -> None:
    """HEAD, and a connection that closes after its response."""

    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"HEAD /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()

    serve(world, scenario)
    assert sum(data.startswith(b"HTTP/1.1 ") for data in writes) == 1
