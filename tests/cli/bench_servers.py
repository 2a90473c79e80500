"""Servers for the tests of ``prefixd bench``: the fake world with a record, and scripted ones."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.clients.loopback import serving


@dataclass
class Recorder:
    """An ASGI application that records the generations sent to another one. Those of more than two
    tokens begin once ``awaited`` of them have run at the same time, or after half a minute."""

    app: Callable[..., Any]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    awaited: int = 0
    _together: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        message = await receive()
        body = json.loads(message["body"])
        self.bodies.append(body)
        pending = [message]

        async def replayed() -> Any:
            return pending.pop() if pending else await receive()

        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if body["max_tokens"] > 2:  # no probe, which is sent alone
                await self._gather()
            await self.app(scope, replayed, send)
        finally:
            self.running -= 1

    async def _gather(self) -> None:
        if self.most_running >= self.awaited:
            self._together.set()
        with anyio.move_on_after(30):
            await self._together.wait()
        self._together.set()  # the others wait no longer

    def reset(self) -> None:
        self.bodies.clear()
        self.most_running = self.awaited = 0
        self._together = asyncio.Event()


def event(value: object) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(text: str, *, finish: str | None = None) -> bytes:
    """An event of a completion."""
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


END = b"data: [DONE]\n\n"


@dataclass
class Peer:
    """A server that answers each generation with what ``answer`` returns for its body: an error
    response, or the pieces of a stream. A piece of None stays open until the client disconnects."""

    answer: Callable[[dict[str, Any]], Response | list[bytes | None]]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_hung_up: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)

    async def handle(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"object": "list", "data": [{"id": "peer"}, {"id": "other"}]})
        body = await request.json()
        self.bodies.append(body)
        answer = self.answer(body)
        if isinstance(answer, Response):
            return answer
        return StreamingResponse(self._pieces(answer), media_type="text/event-stream")

    async def _pieces(self, pieces: list[bytes | None]) -> AsyncIterator[bytes]:
        try:
            for piece in pieces:
                if piece is None:
                    await anyio.sleep_forever()
                else:
                    yield piece
        finally:
            if None in pieces:
                self.num_hung_up += 1
                self.hung_up.set()


@contextmanager
def peer(answer: Callable[[dict[str, Any]], Response | list[bytes | None]]) -> Iterator[Any]:
    """Serve a Peer; yields it and its URL."""
    state = Peer(answer)
    app = Starlette(routes=[Route("/{path:path}", state.handle, methods=["GET", "POST"])])
    with serving(app) as url:
        yield state, url


def whole(body: dict[str, Any]) -> list[bytes | None]:
    """All requested tokens, with usage if it was requested."""
    count = body["max_tokens"]
    events: list[bytes | None] = [chunk(" word") for _ in range(count - 1)]
    events.append(chunk(" end", finish="length"))
    if "stream_options" in body:
        num_words = len(body["prompt"].split())
        usage = {"prompt_tokens": 2 * num_words + 5, "completion_tokens": count}
        events.append(event({"choices": [], "usage": usage}))
    return [*events, END]
