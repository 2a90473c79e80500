"""Connections that never finish the head of a request, on real sockets."""

import asyncio
from collections.abc import Awaitable, Callable

import uvicorn

from prefixd.server.serve.http import bind, uvicorn_config
from prefixd.server.serve.http_refusals import MAX_HEADER_BYTES
from tests.api.api_world import World

HEAD = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"


def serve(world: World, seconds: float, scenario: Callable[[int], Awaitable[None]]) -> None:
    async def main() -> None:
        config = uvicorn_config(world.app, header_timeout_s=seconds)
        config.lifespan = "off"
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[bind("127.0.0.1", 0)]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.001)
        try:
            await scenario(server.servers[0].sockets[0].getsockname()[1])
        finally:
            server.should_exit = True
            await running

    asyncio.run(main())


def test_a_stalled_or_slow_head_closes_the_connection(world: World) -> None:
    async def stall(port: int, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        response = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return response

    async def scenario(port: int) -> None:
        slow = [b"x: 1\r\n"] * 20
        responses = await asyncio.gather(
            stall(port), stall(port, HEAD), stall(port, HEAD, *slow), return_exceptions=True
        )
        assert all(not response or isinstance(response, ConnectionError) for response in responses)

    serve(world, 0.2, scenario)


def test_several_requests_on_one_connection_are_answered(world: World) -> None:
    async def scenario(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(HEAD + b"\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(len(b'{"status":"ok"}'))
            await asyncio.sleep(
                0.6
            )  # longer than the timeout, which does not apply between requests
        writer.close()

    serve(world, 0.5, scenario)


def test_a_head_that_is_too_long_closes_the_connection(world: World) -> None:
    async def scenario(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
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

    serve(world, 30, scenario)
