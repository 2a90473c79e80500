"""Bad clients, in a process of their own so that the server is all that its process runs.

``python -m tests.faults.bad_clients KIND COUNT PORT KEY``: COUNT connections of one kind at once,
from the addresses 127.0.0.2 to 127.0.0.11, until the process is ended. They are opened within
COUNT / OPENED_PER_S seconds. What the server closes is opened again, REOPENED_PER_S of them in a
second. After SETTLED_S more a line is printed. The process has a low priority: it stands for other
machines, and on this one it would take the processor from the server.
"""

import errno
import itertools
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

OPENED_PER_S = 500
REOPENED_PER_S = 100
SETTLED_S = 2
ADDRESSES = [f"127.0.0.{number}" for number in range(2, 12)]

_TICK_S = 0.1
_BODY = json.dumps(
    {"model": "tiny", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
).encode()
_POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
_PUSHED = b"x" * 65536


@dataclass(frozen=True, slots=True)
class Kind:
    """What a client sends first, then once a second or as fast as it can; one that reads nothing
    keeps a small window."""

    first: Callable[[str], bytes]
    slow: bytes = b""
    push: bytes = b""
    reset: bool = False


def _stalled(key: str) -> bytes:
    head = _POST + b"authorization: Bearer %s\r\n" % key.encode()
    return head + b"content-length: %d\r\n\r\n" % len(_BODY) + _BODY


KINDS = {
    "idle": Kind(lambda _key: b""),
    "slow heads": Kind(lambda _key: b"GET /health/live HTTP/1.1\r\n", slow=b"a: b\r\n"),
    "slow bodies": Kind(lambda _key: _POST + b"content-length: 100000\r\n\r\n{", slow=b" "),
    "refused, sending on": Kind(
        lambda _key: _POST + b"content-length: 100000000\r\n\r\n", push=_PUSHED
    ),
    "stalled readers": Kind(_stalled),
    "resets": Kind(lambda _key: b"", reset=True),
}


class BadClients:
    """The connections of one kind."""

    def __init__(self, kind: Kind, count: int, port: int, key: str) -> None:
        self._kind = kind
        self._count = count
        self._port = port
        self._first = kind.first(key)
        self._open: dict[int, socket.socket] = {}
        self._poll = select.poll()
        self._sources = itertools.cycle(ADDRESSES)

    def open(self, number: int) -> None:
        """Open ``number`` connections, as far as they are missing."""
        for _ in range(min(number, self._count - len(self._open))):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.bind((next(self._sources), 0))
            connection.settimeout(10)
            try:
                connection.connect(("127.0.0.1", self._port))
                connection.sendall(self._first)
            except OSError:
                connection.close()
                continue
            if self._kind.reset:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.settimeout(0)
            self._open[connection.fileno()] = connection
            self._poll.register(connection, select.POLLRDHUP)

    def tick(self, *, second: bool) -> None:
        """Send what is due, and drop what the server closed."""
        for number, _ in self._poll.poll(0):
            self._drop(number)
        data = self._kind.push or (self._kind.slow if second else b"")
        if data:
            for number, connection in list(self._open.items()):
                try:
                    connection.send(data)
                except OSError as error:
                    if error.errno not in {errno.EAGAIN, errno.EWOULDBLOCK}:
                        self._drop(number)
        if self._kind.reset:
            for number in list(self._open):
                self._drop(number)

    def _drop(self, number: int) -> None:
        self._poll.unregister(number)
        self._open.pop(number).close()


def main() -> None:
    kind, count, port, key = KINDS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.nice(10)
    clients = BadClients(kind, count, port, key)
    for _ in range(round(count / OPENED_PER_S / _TICK_S)):
        clients.open(round(OPENED_PER_S * _TICK_S))
        clients.tick(second=False)
        time.sleep(_TICK_S)
    for tick in itertools.count(1):
        if tick == round(SETTLED_S / _TICK_S):
            print("opened", flush=True)
        time.sleep(_TICK_S)
        clients.tick(second=tick % round(1 / _TICK_S) == 0)
        clients.open(round((OPENED_PER_S if kind.reset else REOPENED_PER_S) * _TICK_S))


if __name__ == "__main__":
    main()
