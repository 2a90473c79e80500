"""The HTTP socket and uvicorn's configuration: how long a request head may take to arrive."""

import socket
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any, ClassVar

import uvicorn

from prefixd.server.errors import PrefixdError
from prefixd.server.serve.http_refusals import MAX_HEADER_BYTES, RefusingProtocol, head_too_large


def bind(host: str, port: int) -> socket.socket:
    """Bind the address for this process; connections are refused until the server listens on it.

    Raises OSError with a message that names the address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # The address of an earlier server may still be in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot listen on {address(host, port)}: {reason}") from error
    return listener


def address(host: str, port: int) -> str:
    """Host and port as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def uvicorn_config(app: Callable[..., Any], *, header_timeout_s: float) -> uvicorn.Config:
    """Configuration for one process behind a socket that is bound already."""
    protocol = type(
        "HttpProtocol", (HeaderTimeoutProtocol,), {"header_timeout_s": header_timeout_s}
    )
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
    )


class HeaderTimeoutProtocol(RefusingProtocol):
    """uvicorn's protocol, which alone would wait without limit for the end of a request head and
    keep all of it in memory.

    Closes a connection that has not sent a whole head ``header_timeout_s`` after it opened or began
    one, and refuses one that has sent MAX_HEADER_BYTES without its end. Between requests uvicorn's
    own keep-alive limit applies.
    """

    header_timeout_s: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Expect the first head."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that has not ended."""
        if self._header_timer is not None and self._header_bytes > MAX_HEADER_BYTES:
            self.refuse(head_too_large(self._header_bytes))
            return
        self._header_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Expect the head of a further request."""
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().on_headers_complete()

    def refuse(self, error: PrefixdError) -> None:
        """Stop the timer: a response in progress may take longer than a head."""
        self._stop_timer()
        super().refuse(error)

    def _start_timer(self) -> None:
        if self._header_timer is None:
            self._header_bytes = 0
            self._header_timer = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
