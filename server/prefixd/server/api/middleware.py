"""An ASGI layer around every request: its id, receive timeout, log line, and uncaught errors."""

import asyncio
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixd.server.api.anthropic_errors import is_of_anthropic
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import error_response, internal_error
from prefixd.server.api.metrics import Metrics
from prefixd.server.errors import PrefixdError, SlowBody

log = structlog.get_logger("prefixd.http")

REQUEST_ID_HEADER = "x-request-id"
ANTHROPIC_ID_HEADER = "request-id"
"""The same, where Anthropic's clients look for it."""

BODY_PENDING = "body_pending"
"""In a request's state: a function that tells whether a part of its body has not arrived."""

WRITES = "writes"
"""In a request's state: what its response is written to (``HeldWrites``)."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Values of the label; all other methods, which clients may make up, count as one.
_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"})


def request_id_for(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id of a request: the one that its headers (names in lower case) offer, if it is fit to be
    shown and logged, else a new one."""
    wanted = REQUEST_ID_HEADER.encode()
    offered = next((value.decode("latin-1") for name, value in headers if name == wanted), "")
    return offered if _REQUEST_ID.fullmatch(offered) else f"req-{uuid.uuid4().hex}"


class HeldWrites:
    """Writes that can be held back, so that several are sent at once. This one holds none."""

    def hold(self) -> None:
        """Keep what is written from now on."""

    def release(self) -> None:
        """Send what was kept."""


_NOT_HELD = HeldWrites()


class RequestLayer:
    """Gives each request an id, answers HEAD as GET, sends the head of a response together with the
    first part of its body, ends requests whose body arrives too slowly, logs one line, and responds
    to an uncaught exception with a 500 without its details."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        drain_state: DrainState,
        body_timeout: float,
        min_body_rate: float,
    ) -> None:
        """``body_timeout`` is the longest pause in a body, in seconds, and also the longest time
        of a body beyond its size divided by ``min_body_rate`` (bytes per second)."""
        self._app = app
        self._metrics = metrics
        self._drain_state = drain_state
        self._body_timeout = body_timeout
        self._min_body_rate = min_body_rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = request_id_for(scope["headers"])
        state = scope.setdefault("state", {})
        is_head = scope["method"] == "HEAD"
        of_anthropic = is_of_anthropic(scope["path"])
        # Out of the state: it would keep itself alive through this function.
        body_pending = state.pop(BODY_PENDING, lambda: False)
        writes: HeldWrites = state.pop(WRITES, _NOT_HELD)
        state |= {"request_id": request_id, "status": None, "is_head": is_head}
        if is_head:  # answered as GET; a copy, since the server skips the body by its own
            scope = {**scope, "method": "GET"}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                if of_anthropic:
                    headers[ANTHROPIC_ID_HEADER] = request_id
                # The rest of the body would have to be received before the next request.
                if body_pending():
                    headers["connection"] = "close"
                writes.hold()
                await send(message)
                return
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)
            writes.release()

        body = ReceiveTimeout(self._body_timeout, self._min_body_rate, receive)
        try:
            error = await self._handle(scope, body.receive, send_with_id)
            if error is not None and state["status"] is None:
                response = error_response(error, request_id, path=scope["path"])
                await response(scope, receive, send_with_id)
        finally:
            self._report(scope, time.perf_counter() - start)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> PrefixdError | None:
        """Run the application; the error to respond with when it did not handle its exception."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            # At shutdown the time for running requests is over.
            if not self._drain_state.closed:
                raise
            return self._drain_state.refusal("the server stopped before the request was done")
        except ClientDisconnect:
            pass  # in the middle of its body: not a failure, and no client to respond to
        except Exception:
            log.exception("request failed", request_id=scope["state"]["request_id"])
            return internal_error()
        return None

    def _report(self, scope: Scope, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", None) or "unknown"
        method = "HEAD" if state["is_head"] else scope["method"]
        if method not in _METHODS:
            method = "OTHER"
        # No status: the client disconnected before the response began.
        status = state["status"] or 499
        self._metrics.http.labels(method, route, str(status)).inc()
        fields: dict[str, Any] = {
            "request_id": state["request_id"],
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        principal = state.get("principal")
        if principal is not None:
            fields |= {"tenant": principal.tenant, "key_id": principal.key_id}
        log.info("request", **fields)


@dataclass(slots=True)
class ReceiveTimeout:
    """Receives the messages of one request, and limits how long its body may take: ``pause`` and
    ``min_rate`` as of RequestLayer. Only waiting counts, not the server's work in between."""

    pause: float
    min_rate: float
    messages: Receive
    _waited: float = 0.0
    _received: int = 0
    _body_complete: bool = False

    def remaining(self, *, waited: float, received: int) -> float:
        """Seconds to wait for the next chunk, after ``waited`` seconds for ``received`` bytes."""
        return min(self.pause, self.pause + received / self.min_rate - waited)

    async def receive(self) -> Message:
        """The next message. Raises SlowBody for a body that arrives too slowly."""
        if self._body_complete:
            return await self.messages()
        remaining = self.remaining(waited=self._waited, received=self._received)
        start = time.perf_counter()
        try:
            async with asyncio.timeout(remaining):
                message = await self.messages()
        except TimeoutError:
            raise SlowBody(
                f"expected the body to continue within {self.pause:g} s and at "
                f"{self.min_rate:g} bytes per second or more; received {self._received} bytes "
                "in all"
            ) from None
        self._waited += time.perf_counter() - start
        self._received += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._body_complete = True
        return message
