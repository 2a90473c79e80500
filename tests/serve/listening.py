"""The fake world behind a real socket, in this process, with the protocol of ``prefixd serve``."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from prefixd.server.serve.connection_limits import ConnectionLimits
from prefixd.server.serve.http import ConnectionTimeouts, HttpServer, bind, uvicorn_config
from tests.api.api_world import World

MANY = ConnectionLimits(100, 100)

SOON_S = 30.0
"""More than any step of a test takes, in seconds."""


class Listening(HttpServer):
    """A server, for scenarios that look at its connections."""

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    async def until_connected(self, count: int) -> None:
        """Wait until the server has ``count`` connections."""
        async with asyncio.timeout(SOON_S):
            while len(self.server_state.connections) != count:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.005)


def serve(
    world: World,
    scenario: Callable[[Listening], Awaitable[None]],
    *,
    header_s: float = SOON_S,
    write_s: float = SOON_S,
    limits: ConnectionLimits = MANY,
    lifespan: Literal["on", "off"] = "on",
    listener: socket.socket | None = None,
) -> None:
    """Run ``scenario`` while the server listens. With ``lifespan``, the engine runs too."""

    async def main() -> None:
        timeouts = ConnectionTimeouts(header_s, write_s)
        config = uvicorn_config(world.app, timeouts=timeouts, limits=limits, metrics=world.metrics)
        config.lifespan = lifespan
        server = Listening(config)
        running = asyncio.create_task(server.serve(sockets=[listener or bind("127.0.0.1", 0)]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.001)
        try:
            await scenario(server)
        finally:
            server.should_exit = True
            await running

    asyncio.run(main())


def abort_of(world: World) -> threading.Event:
    """Set once the engine received an abort."""
    abort, aborted = world.engine.abort, threading.Event()

    def abort_and_tell(request_id: str) -> None:
        abort(request_id)
        aborted.set()

    world.engine.abort = abort_and_tell  # type: ignore[method-assign]
    return aborted


def read_response(connection: socket.socket) -> tuple[bytes, dict[str, str], Any]:
    """Status line, headers and JSON of one response; its end is that of its content-length."""
    received = connection.makefile("rb", buffering=0)
    status = received.readline()
    headers = {}
    while line := received.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name] = value
    body = b""
    while len(body) < int(headers["content-length"]):
        piece = received.read(int(headers["content-length"]) - len(body))
        assert piece, f"the response ended after {body!r}"
        body += piece
    return status, headers, json.loads(body)


def serve_port(world: World, header_s: float, scenario: Callable[[int], Awaitable[None]]) -> None:
    """As ``serve``, for a scenario that needs the port alone and starts the engine itself."""
    serve(world, lambda server: scenario(server.port), header_s=header_s, lifespan="off")
