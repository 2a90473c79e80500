"""One line of a batch as a request to the application itself: the same route, limits and usage as
for a client, with the principal of the batch's key and in the background class."""

import asyncio
import json
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from prefixd.server.api.dependencies import INSIDE
from prefixd.server.tenants.principal import Principal

_RETRIED = frozenset({429, 503, 507})
_FINAL = frozenset({"insufficient_quota"})
_RETRY_S = 1.0
_MOST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class LineResponse:
    """The response to a line. ``retry_after`` in seconds: the server may take it later; None: it is
    the answer."""

    status: int
    body: bytes
    retry_after: float | None


async def send_line(
    app: ASGIApp, *, path: str, body: bytes, request_id: str, principal: Principal
) -> LineResponse:
    """Send a request from inside; a cancelled task ends it as a client that disconnects."""
    start: Message = {}
    chunks: list[bytes] = []
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:  # it never disconnects
            await asyncio.get_running_loop().create_future()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            chunks.append(message.get("body", b""))

    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {INSIDE: principal},
    }
    await app(scope, receive, send)
    content, status = b"".join(chunks), start["status"]
    return LineResponse(
        status, content, _retry_after(status, content, Headers(raw=start["headers"]))
    )


def _retry_after(status: int, content: bytes, headers: Headers) -> float | None:
    if status not in _RETRIED or json.loads(content)["error"]["code"] in _FINAL:
        return None
    wanted = headers.get("retry-after", "")
    return min(float(wanted) if wanted.isdigit() else _RETRY_S, _MOST_RETRY_S)
