"""Server-sent events: frames, and a response that closes its source when the client goes away."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefixd.server.api.generate.event_stream import ClientGone, while_connected

DONE = b"data: [DONE]\n\n"


def frame(payload: Any) -> bytes:
    """One event with ``payload`` as JSON."""
    return b"data: " + to_json(payload) + b"\n\n"


class EventStream(Response):
    """Sends frames as they come. However it ends, ``frames`` is closed before it returns, so that
    a disconnect frees what the generator holds at once and not at the next garbage collection."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, frames: AsyncGenerator[bytes], headers: Mapping[str, str]
    ) -> None:
        """``first`` was taken from ``frames`` already."""
        self._first = first
        self._frames = frames
        self.status_code = 200
        self.background = None
        # nginx would hold the stream back otherwise.
        self.init_headers({**headers, "cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the source ends or the client is gone."""
        del scope
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientGone, OSError):
            return
        finally:
            await self._frames.aclose()

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for data in self._frames:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
