"""Requests that never reach the application: not valid HTTP, too large a head, unknown framing.

The parser fails inside a callback of uvicorn's protocol, so the refusal is an exception of that
callback: httptools wraps it, and uvicorn then calls ``send_400_response``.
"""

import json
import sys
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import structlog
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from prefixd.server.api.error_responses import error_body, error_response
from prefixd.server.api.middleware import REQUEST_ID_HEADER, request_id_for
from prefixd.server.errors import (
    BadRequest,
    HeadTooLarge,
    PrefixdError,
    UnsupportedTransferCoding,
)
from prefixd.server.serve.parser import UpgradeIgnoringParser

log = structlog.get_logger("prefixd.http")

MAX_HEADER_BYTES = 64 * 1024

_LINE_BYTES = 4
"""Of a header line besides name and value: colon, space, CR and LF."""

_VERSIONS = ("1.0", "1.1")

_FRAMING = (b"transfer-encoding", b"content-length")


def check_head(url: bytes, headers: Sequence[tuple[bytes, bytes]], version: str) -> None:
    """Raise HeadTooLarge, BadRequest or UnsupportedTransferCoding for a request head (header names
    in lower case) whose body this server would not delimit as any other server does.

    RFC 9112, sections 6.1 and 6.3: a message with Transfer-Encoding and Content-Length, or with
    Transfer-Encoding in HTTP/1.0, is how requests are smuggled past a proxy.
    """
    size = len(url) + sum(len(name) + len(value) + _LINE_BYTES for name, value in headers)
    if size > MAX_HEADER_BYTES:
        raise head_too_large(size)
    if version not in _VERSIONS:
        raise BadRequest(f"expected HTTP/1.1; received HTTP/{version}", code="invalid_http")
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (not hosts and version == "1.1"):  # RFC 9112, section 3.2
        raise BadRequest(f"expected one Host header; received {hosts}", code="invalid_http")
    framing = [(name, value) for name, value in headers if name in _FRAMING]
    codings = [value.strip(b" \t") for name, value in framing if name == b"transfer-encoding"]
    if not codings:
        return
    if len(codings) < len(framing):
        raise BadRequest(
            "expected Transfer-Encoding or Content-Length; received both", code="invalid_http"
        )
    if version == "1.0":
        raise BadRequest(
            "expected no Transfer-Encoding in HTTP/1.0; received one", code="invalid_http"
        )
    if len(codings) > 1 or codings[0].lower() != b"chunked":
        received = b", ".join(codings).decode("latin-1")
        raise UnsupportedTransferCoding(
            f"expected the transfer coding chunked and no other; received {received[:80]!a}"
        )


def head_too_large(received: int) -> HeadTooLarge:
    """The error for a request head of at least ``received`` bytes."""
    return HeadTooLarge(
        f"expected a request line and headers of at most {MAX_HEADER_BYTES} bytes; received "
        f"at least {received}"
    )


class RefusingProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which answers a request that it cannot parse as the application answers
    other errors: in the one shape, with a request id. The connection is closed."""

    parser: UpgradeIgnoringParser  # type: ignore[assignment]  # has what uvicorn calls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = UpgradeIgnoringParser(self)
        self._in_body = False
        self._refused = False
        self._overhead_bytes = 0
        self._running: RequestResponseCycle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Abort the request in progress; uvicorn knows only the one that was received last."""
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless the connection already failed to parse. Trailers and chunk extensions are
        limited as a head is."""
        if self._refused:
            return
        self._overhead_bytes += len(data)
        super().data_received(data)
        if self._in_body and self._overhead_bytes > MAX_HEADER_BYTES and not self._refused:
            self.refuse(head_too_large(self._overhead_bytes))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. A trailer must not act as one (RFC 9110, section 6.5.1): it is dropped."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check what the parser accepts and the server does not."""
        check_head(self.url, self.headers, self.parser.get_http_version())
        super().on_headers_complete()
        self.parser.end_head(self.headers)
        self._in_body = True
        self._overhead_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._overhead_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body has ended: an error after it belongs to the next request."""
        if self.parser.body_follows:
            return
        self._in_body = False
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _path(self) -> str:
        """The path of the request, as far as it was received."""
        url: bytes = getattr(self, "url", b"")  # unset before the first request
        return url.partition(b"?")[0].decode("latin-1")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's one sentence
        """Refuse the request that the parser failed on."""
        self.refuse(_from_parser(sys.exception()))

    def refuse(self, error: PrefixdError) -> None:
        """Respond with ``error`` and close the connection; after the response in progress, when it
        is the next request that is wrong."""
        self._refused = True
        cycle = self.cycle
        in_progress = cycle is not None and not cycle.response_complete
        if self._in_body and self.pipeline:  # other responses come first
            request_id = request_id_for(self.headers)
            log.info("refused", request_id=request_id, status=error.status, code=error.code)
            cycle.keep_alive = False
            self.pipeline[0] = (cycle, _final_response(error, request_id, self._path))
        elif self._in_body and cycle.response_started:
            self.transport.close()
        elif in_progress and not self._in_body:
            cycle.keep_alive = False
        else:
            state = cycle.scope.get("state", {}) if self._in_body else {}
            request_id = state.get("request_id") or request_id_for(self.headers or ())
            log.info("refused", request_id=request_id, status=error.status, code=error.code)
            if in_progress:  # the application waits for a body that will not be complete
                cycle.disconnected = True
                cycle.message_event.set()
            headers = self.server_state.default_headers
            self.transport.write(_response(error, request_id, self._path, headers))
            self.transport.close()


def _from_parser(failure: BaseException | None) -> PrefixdError:
    """The error for an exception of httptools, whose context is that of a callback."""
    cause = None if failure is None else failure.__context__
    if isinstance(cause, PrefixdError):
        return cause
    reason = str(failure) if cause is None else "the request target is malformed"
    if "Transfer-Encoding" in reason and "Content-Length" not in reason:
        return UnsupportedTransferCoding(
            f"expected the transfer coding chunked, once and no other; received another: {reason}"
        )
    return BadRequest(
        f"expected a valid HTTP/1.1 request; received one that is not: {reason}",
        code="invalid_http",
    )


def _final_response(error: PrefixdError, request_id: str, path: str) -> ASGI3Application:
    """An application that responds with ``error``; the connection is closed after it."""
    headers = {REQUEST_ID_HEADER: request_id, "connection": "close"}
    return cast("ASGI3Application", error_response(error, request_id, headers, path=path))


def _response(
    error: PrefixdError,
    request_id: str,
    path: str,
    default_headers: Sequence[tuple[bytes, bytes]],
) -> bytes:
    body = json.dumps(error_body(error, request_id, path=path), separators=(",", ":")).encode()
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (REQUEST_ID_HEADER.encode(), request_id.encode()),
        (b"connection", b"close"),
    ]
    lines = [b"%s: %s\r\n" % header for header in headers]
    return b"".join((STATUS_LINE[HTTPStatus(error.status)], *lines, b"\r\n", body))
