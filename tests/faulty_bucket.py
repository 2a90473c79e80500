"""A proxy in front of an S3 that hangs, is slow, answers 503 or cuts bodies, as a test chooses."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum, auto

_CHUNK = 64 * 1024
_UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Fault(StrEnum):
    """What happens to the bytes of each connection."""

    NONE = auto()
    HANG = auto()
    UNAVAILABLE = auto()
    CUT_RESPONSE = auto()
    CUT_REQUEST = auto()
    SLOW = auto()
    SLOW_REQUEST = auto()


@dataclass
class FaultyBucket:
    """The proxy. ``limit`` bytes of a request or response pass before it is cut or stops; a SLOW
    response or request has pieces of ``piece`` bytes, one each ``pause_s``; a
    shorter one passes at once."""

    upstream: tuple[str, int]
    port: int = 0
    fault: Fault = Fault.NONE
    limit: int = 0
    piece: int = 1
    pause_s: float = 0.05
    num_connections: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, client: socket.socket) -> None:
        """Pass the bytes of one connection in both directions, until either side closes."""
        self.num_connections += 1
        with suppress(OSError), socket.create_connection(self.upstream, timeout=60) as server:
            back = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
            back.start()
            self._pump(client, server, True)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                if is_request and self.fault is Fault.UNAVAILABLE:
                    source.sendall(_UNAVAILABLE)
                    break
                if self._cuts(is_request) and passed + len(data) > self.limit:
                    target.sendall(data[: self.limit - passed])
                    break
                while self.fault is Fault.HANG and passed + len(data) > self.limit:
                    self.limit = 0  # now all connections hang
                    if self._ended.wait(0.01):
                        return
                passed += len(data)
                if self.fault is (Fault.SLOW_REQUEST if is_request else Fault.SLOW):
                    self._send_slowly(target, data)
                else:
                    target.sendall(data)
        for side in (source, target):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _cuts(self, is_request: bool) -> bool:
        return self.fault is (Fault.CUT_REQUEST if is_request else Fault.CUT_RESPONSE)

    def _send_slowly(self, target: socket.socket, data: bytes) -> None:
        for begin in range(0, len(data), self.piece):
            part = data[begin : begin + self.piece]
            target.sendall(part)
            if len(part) == self.piece and self.fault is not Fault.NONE:
                self._ended.wait(self.pause_s)

    def end(self) -> None:
        """End all connections that hang."""
        self._ended.set()


@contextmanager
def faulty_bucket(endpoint: str) -> Iterator[FaultyBucket]:
    """A proxy for the S3 at ``endpoint``, for the duration of the block."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    bucket = FaultyBucket((host, int(port)))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            bucket.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        bucket.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield bucket
        finally:
            bucket.end()
            server.shutdown()
            thread.join()
