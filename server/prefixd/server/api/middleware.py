"""An ASGI layer around every request: its id, receive timeout, log line, and uncaught errors."""

import asyncio
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import error_response, internal_error
from prefixd.server.api.metrics import Metrics
from prefixd.server.errors import SlowBody

log = structlog.get_logger("prefixd.http")

REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Values of the label; all other methods, which clients may make up, count as one.
_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class RequestLayer:
    """Gives each request an id, ends requests whose body arrives too slowly, logs one line, and
    responds to an uncaught exception with a 500 without its details."""

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
        self._receive_timeout = ReceiveTimeout(body_timeout, min_body_rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._receive_timeout)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # At shutdown the time for running requests is over.
            if not self._drain_state.closed:
                raise
            if exchange.status is None:
                error = self._drain_state.refusal("the server stopped before the request was done")
                await error_response(error, exchange.request_id)(scope, receive, exchange.send)
        except ClientDisconnect:
            pass  # in the middle of its body: not a failure, and no client to respond to
        except Exception:
            log.exception("request failed", request_id=exchange.request_id)
            if exchange.status is None:
                response = error_response(internal_error(), exchange.request_id)
                await response(scope, receive, exchange.send)
        finally:
            self._report(scope, exchange)

    def _report(self, scope: Scope, exchange: "_Exchange") -> None:
        route = getattr(scope.get("route"), "path", None) or "unknown"
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        # No status: the client disconnected before the response began.
        status = exchange.status or 499
        self._metrics.http.labels(method, route, str(status)).inc()
        fields: dict[str, Any] = {
            "request_id": exchange.request_id,
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(time.perf_counter() - exchange.started, 4),
        }
        principal = scope["state"].get("principal")
        if principal is not None:
            fields |= {"tenant": principal.tenant, "key_id": principal.key_id}
        log.info("request", **fields)


@dataclass(frozen=True, slots=True)
class ReceiveTimeout:
    """How long to wait for a body. Only waiting counts, not the server's work in between."""

    pause: float
    min_rate: float

    def remaining(self, *, waited: float, received: int) -> float:
        """Seconds to wait for the next chunk, after ``waited`` seconds for ``received`` bytes."""
        return min(self.pause, self.pause + received / self.min_rate - waited)


class _Exchange:
    """The messages of one request and its response."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, receive_timeout: ReceiveTimeout
    ) -> None:
        offered = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        is_valid = _REQUEST_ID.fullmatch(offered) is not None
        self.request_id = offered if is_valid else f"req-{uuid.uuid4().hex}"
        self.started = time.perf_counter()
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._receive_timeout = receive_timeout
        self._waited = 0.0
        self._received = 0
        self._body_complete = False
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def receive(self) -> Message:
        """The next message. Raises SlowBody for a body that arrives too slowly."""
        if self._body_complete:
            return await self._receive()
        remaining = self._receive_timeout.remaining(waited=self._waited, received=self._received)
        start = time.perf_counter()
        try:
            async with asyncio.timeout(remaining):
                message = await self._receive()
        except TimeoutError:
            raise SlowBody(
                f"expected the body to continue within {self._receive_timeout.pause:g} s and at "
                f"{self._receive_timeout.min_rate:g} bytes per second or more; received "
                f"{self._received} bytes in all"
            ) from None
        self._waited += time.perf_counter() - start
        self._received += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._body_complete = True
        return message

    async def send(self, message: Message) -> None:
        """Add the id to the response's headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID_HEADER] = self.request_id
        await self._send(message)
