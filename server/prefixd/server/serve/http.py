"""The HTTP socket and uvicorn's configuration: how long a request head may take to arrive, and how
a connection ends."""

import asyncio
import socket
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import uvicorn

from prefixd.server.api.metrics import Metrics
from prefixd.server.api.middleware import BODY_PENDING, WRITES
from prefixd.server.errors import PrefixdError
from prefixd.server.serve.connection_limits import ConnectionLimits
from prefixd.server.serve.connections import Connections
from prefixd.server.serve.http_refusals import MAX_HEADER_BYTES, RefusingProtocol, head_too_large
from prefixd.server.serve.listener import Listener
from prefixd.server.serve.logging import LimitedWarning
from prefixd.server.serve.transport import LingeringTransport


def bind(host: str, port: int) -> socket.socket:
    """Bind the address for this process; connections are refused until the server listens on it.

    Raises OSError with a message that names the address.
    """
    # asyncio sets TCP_NODELAY only where the protocol is named. Without it, streams wait 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


MAX_READ_BYTES = 64 * 1024
"""Most bytes that are received at once, and so the memory of a client that is refused."""


@dataclass(frozen=True, slots=True)
class ConnectionTimeouts:
    """Seconds for a request head to arrive, and for a client to take something of its answer."""

    header_s: float
    write_s: float


def uvicorn_config(
    app: Callable[..., Any],
    *,
    timeouts: ConnectionTimeouts,
    limits: ConnectionLimits,
    metrics: Metrics,
) -> uvicorn.Config:
    """Configuration for one HttpServer."""
    shared = {
        "timeouts": timeouts,
        "open_connections": Connections(limits, metrics),
        "metrics": metrics,
        "stall_warning": LimitedWarning("disconnected a client that stopped reading"),
    }
    protocol = type("Protocol", (HttpProtocol,), shared)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
    )


class HttpServer(uvicorn.Server):
    """uvicorn's server behind sockets that are bound already, which accepts connections within
    their limits."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and listen."""
        await super().startup(sockets=[])
        protocol = cast("type[HttpProtocol]", self.config.http_protocol_class)
        for listening in sockets or ():
            listener = Listener(
                listening,
                partial(self._protocol_of, protocol),
                connections=protocol.open_connections,
                metrics=protocol.metrics,
            )
            listener.start()
            self.servers.append(cast("asyncio.Server", listener))

    def _protocol_of(self, protocol: type["HttpProtocol"], address: str) -> "HttpProtocol":
        return protocol(self.config, self.server_state, self.lifespan.state, accepted_from=address)


class HttpProtocol(RefusingProtocol):
    """uvicorn's protocol, which alone would wait without limit for the end of a request head, keep
    all of it in memory, and stay connected to a client that sends no more or reads no more.

    Closes a connection without a whole head ``header_s`` after it opened or began one, and
    refuses one that has sent MAX_HEADER_BYTES without its end. Between requests uvicorn's own
    keep-alive limit applies. For how a connection is closed, see LingeringTransport.
    """

    timeouts: ClassVar[ConnectionTimeouts]
    open_connections: ClassVar[Connections]
    metrics: ClassVar[Metrics]
    stall_warning: ClassVar[LimitedWarning]
    transport: LingeringTransport

    def __init__(self, *args: Any, accepted_from: str | None = None, **kwargs: Any) -> None:
        """``accepted_from``: the address by which the connection was counted. That of the socket is
        unknown once the client has reset it."""
        super().__init__(*args, **kwargs)
        self._accepted_from = accepted_from
        self._header_timer: TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Expect the first head."""
        if hasattr(transport, "max_size"):  # asyncio's own; it would read 256 KiB at a time
            transport.max_size = MAX_READ_BYTES
        lingering = LingeringTransport(
            transport, self.loop, write_timeout_s=self.timeouts.write_s, on_stall=self._on_stall
        )
        super().connection_made(lingering)
        self.open_connections.waits(self)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_timer()
        self.transport.stop()
        self.open_connections.works(self)
        if self._accepted_from is not None:
            self.open_connections.release(self._accepted_from)
        super().connection_lost(exc)

    def evict(self) -> None:
        """Close the connection at once: it waits for a request and another one needs its place."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that has not ended."""
        if self.transport.is_closing():
            self.transport.discard(data)
            return
        if self._header_timer is not None and self._header_bytes > MAX_HEADER_BYTES:
            self.refuse(head_too_large(self._header_bytes))
            return
        if self.cycle is None or self.cycle.response_complete:
            # Also for line ends before a request, which end the keep-alive limit.
            self._start_timer()
        self._header_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Expect the head of a further request."""
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        """Stop the timer, and let the application ask whether the body is complete."""
        self._stop_timer()
        super().on_headers_complete()
        self.open_connections.works(self)
        cycle = self.cycle
        self.scope["state"][BODY_PENDING] = lambda: cycle.more_body
        self.scope["state"][WRITES] = self.transport

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has arrived already."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self.cycle.body = bytearray()  # what the application did not read
            self.open_connections.waits(self)

    def _on_stall(self) -> None:
        self.metrics.write_timeouts.inc()
        self.stall_warning.log(client=self._accepted_from)

    def refuse(self, error: PrefixdError) -> None:
        """Stop the timer: a response in progress may take longer than a head."""
        self._stop_timer()
        super().refuse(error)

    def _start_timer(self) -> None:
        if self._header_timer is None:
            self._header_bytes = 0
            self._header_timer = self.loop.call_later(self.timeouts.header_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
