"""The listening socket: accepts connections within their limits, and goes on after a failure.

asyncio's own server accepts up to its whole backlog before anything else runs, and after a failure
to accept tries again as often, with a traceback for each.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from prefixd.server.api.error_responses import error_body
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.middleware import request_id_for
from prefixd.server.errors import Unavailable
from prefixd.server.serve.connections import Connections
from prefixd.server.serve.logging import LimitedWarning

BACKLOG = 2048

_ACCEPTS_PER_TURN = 16
"""Connections accepted before the loop runs something else: a flood delays running requests by
that many."""

_PAUSE_S = 0.1
"""Between two attempts to accept after one failed, in seconds."""

_UNSENT_BYTES = 128 * 1024
"""Most bytes that the kernel keeps for a client that does not read; its own limit is megabytes."""

_DISCARDED_BYTES = 64 * 1024
_RETRY_AFTER_S = 1


class Listener:
    """Accepts the connections of one bound socket. uvicorn closes it as one of asyncio's servers.

    A connection over a limit gets a 503 at once, without waiting for its request, and is closed.
    When the process or the machine has no descriptors or memory for another connection, accepting
    pauses; clients then wait in the backlog.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_protocol: Callable[[str], asyncio.BaseProtocol],
        *,
        connections: Connections,
        metrics: Metrics,
    ) -> None:
        self.sockets = (listening,)
        self._socket = listening
        self._make_protocol = make_protocol
        self._connections = connections
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._tasks = set[asyncio.Task[None]]()
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False
        self._warning = LimitedWarning("cannot accept connections")

    def start(self) -> None:
        """Listen."""
        self._socket.listen(BACKLOG)
        self._socket.settimeout(0)
        self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Stop accepting; accepted connections stay."""
        if self._closed:
            return
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    async def wait_closed(self) -> None:
        """Wait for nothing: the socket is closed at once."""

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                connection, peer = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause_after(error)
                return
            connection.settimeout(0)
            address = peer[0] if isinstance(peer, tuple) else ""  # of a Unix socket
            if self._connections.admit(address) is not None:
                self._refuse(connection)
                continue
            with suppress(OSError):  # the client is gone, or it is no TCP
                # asyncio does it only where the listening socket was made for TCP by name. Without
                # it, a stream waits 40 ms after its first bytes.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError, AttributeError):  # macOS names it otherwise
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
            task = self._loop.create_task(self._serve(connection, address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket, address: str) -> None:
        try:
            await self._loop.connect_accepted_socket(
                partial(self._make_protocol, address), connection
            )
        except OSError:
            connection.close()
            self._connections.release(address)

    def _refuse(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.send(_refusal())
            # A request that has arrived would turn the close into a reset.
            connection.recv(_DISCARDED_BYTES)

    def _pause_after(self, error: OSError) -> None:
        self._metrics.accept_failures.inc()
        self._warning.log(why=error.strerror)
        self._loop.remove_reader(self._socket)
        self._pause = self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._accept)


def _refusal() -> bytes:
    """The response to a connection over a limit."""
    error = Unavailable(
        "expected fewer connections to this server; received one more than it or one address may "
        "have",
        code="too_many_connections",
    )
    request_id = request_id_for(())
    body = json.dumps(error_body(error, request_id), separators=(",", ":")).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\nretry-after: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
        % (len(body), _RETRY_AFTER_S, request_id.encode())
    ) + body
