"""Requests that never reach the application: not valid HTTP, too large a head, unknown framing.

The parser fails inside a callback of uvicorn's protocol, so the refusal is an exception of that
callback: httptools wraps it, and uvicorn then calls ``send_400_response``.
"""

import json
import sys
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from prefixd.server.api.error_responses import error_body
from prefixd.server.api.middleware import REQUEST_ID_HEADER, request_id_for
from prefixd.server.errors import (
    BadRequest,
    HeadTooLarge,
    PrefixdError,
    UnsupportedTransferCoding,
)

log = structlog.get_logger("prefixd.http")

MAX_HEADER_BYTES = 64 * 1024

_LINE_BYTES = 4
"""Of a header line besides name and value: colon, space, CR and LF."""

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_body = False
        self._refused = False

    def data_received(self, data: bytes) -> None:
        """Parse, unless the connection already failed to parse."""
        if not self._refused:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        """Check what the parser accepts and the server does not."""
        check_head(self.url, self.headers, self.parser.get_http_version())
        super().on_headers_complete()
        self._in_body = True

    def on_message_complete(self) -> None:
        """The body has ended: an error after it belongs to the next request."""
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's one sentence
        """Refuse the request that the parser failed on."""
        self.refuse(_from_parser(sys.exception()))

    def refuse(self, error: PrefixdError) -> None:
        """Respond with ``error`` and close the connection; after the response in progress, when it
        is the next request that is wrong."""
        self._refused = True
        cycle = self.cycle
        in_progress = cycle is not None and not cycle.response_complete
        if self._in_body and (cycle.response_started or self.pipeline):
            # The request that is broken has its response already, or another's is being written.
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
            self.transport.write(_response(error, request_id, self.server_state.default_headers))
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


def _response(
    error: PrefixdError, request_id: str, default_headers: Sequence[tuple[bytes, bytes]]
) -> bytes:
    body = json.dumps(error_body(error, request_id), separators=(",", ":")).encode()
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (REQUEST_ID_HEADER.encode(), request_id.encode()),
        (b"connection", b"close"),
    ]
    lines = [b"%s: %s\r\n" % header for header in headers]
    return b"".join((STATUS_LINE[HTTPStatus(error.status)], *lines, b"\r\n", body))
