"""Faults of a whole server, each one a context: it stands from the entry to the exit."""

import json
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

_PAUSE_S = 0.5


@contextmanager
def locked_catalog(file: Path) -> Iterator[None]:
    """Another process holds SQLite's write lock."""
    connection = sqlite3.connect(file, isolation_level=None, timeout=60, check_same_thread=False)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@contextmanager
def paused_postgres(port: int) -> Iterator[None]:
    """SIGSTOP for the PostgreSQL on ``port`` and all its backends."""
    (main,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_postgres(entry, port)
    )
    stopped: list[int] = []
    try:
        _signal(main, signal.SIGSTOP)  # first: it starts no backend after that
        stopped.append(main)
        for pid in _children(main):
            _signal(pid, signal.SIGSTOP)
            stopped.append(pid)
        yield
    finally:
        for pid in reversed(stopped):
            _signal(pid, signal.SIGCONT)


@contextmanager
def connections(url: str, *, sources: Sequence[str], each: int, sent: bytes) -> Iterator[None]:
    """``each`` connections from every address of ``sources``, which send ``sent`` and hold on."""
    with ExitStack() as opened:
        for source in sources:
            for _ in range(each):
                with suppress(OSError):  # refused: there are too many
                    one = opened.enter_context(connect(url, source))
                    one.sendall(sent)
        yield


@contextmanager
def open_upload(url: str, key: str) -> Iterator[None]:
    """A request that runs until the block ends: its body does not end before."""
    head = (
        f"PUT /v1/prefixes/open HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n"
    )
    target = urlsplit(url)
    with socket.create_connection((target.hostname, target.port), timeout=60) as sender:
        sender.sendall(head.encode())
        assert sender.recv(4096).startswith(b"HTTP/1.1 100 ")  # the server waits for the body
        yield


@contextmanager
def dribblers(url: str, *, source: str, count: int) -> Iterator[None]:
    """``count`` clients without a key, which send a byte of their bodies now and then."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
    ended = threading.Event()

    def send(sockets: list[socket.socket]) -> None:
        while not ended.wait(_PAUSE_S):
            for one in sockets:
                with suppress(OSError):  # closed by the server
                    one.sendall(b" ")

    with ExitStack() as opened:
        sockets = [opened.enter_context(connect(url, source)) for _ in range(count)]
        for one in sockets:
            one.sendall(head)
        sender = threading.Thread(target=send, args=(sockets,), daemon=True)
        sender.start()
        try:
            yield
        finally:
            ended.set()
            sender.join()


@contextmanager
def stalled_readers(
    url: str, *, source: str, key: str, body: dict[str, object], count: int
) -> Iterator[None]:
    """``count`` clients that start a stream and do not read it."""
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode()
    with connections(url, sources=[source], each=count, sent=head + content):
        yield


def connect(url: str, source: str) -> socket.socket:
    """A connection from the address ``source`` with the smallest receive buffer."""
    target = urlsplit(url)
    one = socket.socket()
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        one.settimeout(10)
        one.bind((source, 0))
        one.connect((target.hostname, target.port))
    except BaseException:
        one.close()
        raise
    return one


def descriptors_and_threads(pid: int) -> tuple[int, int]:
    """How many the process has now."""
    process = Path("/proc") / str(pid)
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def _is_postgres(process: Path, port: int) -> bool:
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return Path(os.fsdecode(command[0])).name == "postgres" and str(port).encode() in command


def _children(pid: int) -> list[int]:
    text = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text()
    return [int(child) for child in text.split()]


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
