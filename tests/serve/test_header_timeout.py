"""Connections that never finish the head of a request, on real sockets."""

import asyncio

from prefixd.server.serve.http_refusals import MAX_HEADER_BYTES
from tests.api.api_world import World
from tests.serve.listening import Listening, serve

HEAD = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"


def test_a_stalled_or_slow_head_closes_the_connection(world: World) -> None:
    async def stall(port: int, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        response = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return response

    async def scenario(server: Listening) -> None:
        port = server.port
        slow = [b"x: 1\r\n"] * 20
        responses = await asyncio.gather(
            stall(port), stall(port, HEAD), stall(port, HEAD, *slow), return_exceptions=True
        )
        assert all(not response or isinstance(response, ConnectionError) for response in responses)

    serve(world, scenario, header_s=0.2)


def test_several_requests_on_one_connection_are_answered(world: World) -> None:
    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(3):
            writer.write(HEAD + b"\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(len(b'{"status":"ok"}'))
            await asyncio.sleep(
                0.6
            )  # longer than the timeout, which does not apply between requests
        writer.close()

    serve(world, scenario, header_s=0.5)


def test_a_head_that_is_too_long_closes_the_connection(world: World) -> None:
    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        sent = 0
        writer.write(HEAD)
        try:
            while sent < 100 * MAX_HEADER_BYTES:
                writer.write(b"x: " + b"y" * 8192 + b"\r\n")
                await writer.drain()
                sent += 8192
        except ConnectionError:
            pass
        assert sent < 100 * MAX_HEADER_BYTES
        del reader
        writer.close()

    serve(world, scenario)
