"""A server on 127.0.0.1 that sends scripted responses, for clients with a real socket."""

import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


@dataclass
class ReceivedRequest:
    """One request as the server received it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    json: object
    parts: dict[str, bytes]
    octets: bytes | None = None


@dataclass
class ScriptedResponse:
    """``stream`` replaces ``body`` by pieces; with ``endless`` the stream then stays open."""

    body: object = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stream: tuple[bytes, ...] = ()
    endless: bool = False


@dataclass
class Loopback:
    """The running server: queue responses, inspect the requests in ``seen``. Neither has those of
    one model (``GET /v1/models/NAME``): ``models`` has their recipes, by default none."""

    url: str = ""
    replies: deque[ScriptedResponse] = field(default_factory=deque)
    seen: list[ReceivedRequest] = field(default_factory=list)
    models: dict[str, object] = field(default_factory=dict)
    hung_up: threading.Event = field(default_factory=threading.Event)

    def reply(self, body: object = None, *, status: int = 200, **headers: str) -> None:
        """Queue a response; ``retry_after="1"`` becomes the header ``retry-after``."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.replies.append(ScriptedResponse(body=body, status=status, headers=named))

    def stream(self, *pieces: bytes, endless: bool = False, **headers: str) -> None:
        """Queue a response that is an event stream."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.replies.append(ScriptedResponse(stream=pieces, endless=endless, headers=named))

    def reset(self) -> None:
        """Drop queued responses and received requests."""
        self.replies.clear()
        self.seen.clear()
        self.models.clear()
        self.hung_up.clear()

    async def handle(self, request: Request) -> Response:
        path = request.url.path
        if request.method == "GET" and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            return Response(json.dumps({"id": name, "recipe": self.models.get(name)}))
        self.seen.append(await _received(request))
        reply = self.replies.popleft()
        if reply.stream:
            return StreamingResponse(
                self._pieces(reply), headers=reply.headers, media_type="text/event-stream"
            )
        body = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        return Response(body, status_code=reply.status, headers=reply.headers)

    async def _pieces(self, reply: ScriptedResponse) -> AsyncIterator[bytes]:
        try:
            for piece in reply.stream:
                yield piece
            if reply.endless:
                await anyio.sleep_forever()  # until the client disconnects
        finally:
            self.hung_up.set()


async def _received(request: Request) -> ReceivedRequest:
    kind = request.headers.get("content-type", "")
    parts: dict[str, bytes] = {}
    body: object = None
    octets: bytes | None = None
    if kind.startswith("multipart/"):
        async with request.form() as form:
            for name, part in form.items():
                assert not isinstance(part, str), f"the part {name} came without a file name"
                parts[name] = await part.read()
    elif kind == "application/json":
        body = await request.json()
    elif kind == "application/octet-stream":
        octets = await request.body()
    return ReceivedRequest(
        method=request.method,
        path=request.scope["raw_path"].decode(),
        query={name: ",".join(request.query_params.getlist(name)) for name in request.query_params},
        headers=dict(request.headers),
        json=body,
        parts=parts,
        octets=octets,
    )


class _Server(uvicorn.Server):
    """A server that sets ``listening``, so that starting it needs no polling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.listening.set()


@contextmanager
def serving(app: Callable[..., Any]) -> Iterator[str]:
    """Serve an application on a free port of 127.0.0.1, in a thread; yields its URL."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none")
    server = _Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.listening.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def loopback() -> Iterator[Loopback]:
    """Run the scripted server while the block lasts."""
    state = Loopback()
    methods = ["GET", "PUT", "POST", "PATCH", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", state.handle, methods=methods)])
    with serving(app) as state.url:
        yield state
