"""A process that renders chat templates of tenants, each in a child of its own with hard limits.

The server starts this file as a script. It imports Jinja once; then, for each file descriptor that
arrives on standard input, it forks a child. The child reads one request from that socket until its
end, writes one reply and exits: nothing of a template is left for the next one, and one that loops
delays no other. A child that begins and gives no reply died of its limits.

::

    server ---- standard input: one byte and a socket for each render ----> this process
       ^                                                                       | fork
       +------- the socket: request as JSON; one byte, reply as JSON ------- child

Requests: ``{"template", "variables", "max_characters"}``. Replies: ``{"text"}``, or ``{"error",
"cause"}``. No module of prefixd is imported here.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 1
MEMORY_BYTES = 256 * 1024 * 1024
BEGUN = b"+"
NICENESS = 10
"""Threads that compute tokens run first."""

_MAX_MESSAGE = 500
_CHUNK = 1 << 16


class Rejected(Exception):
    """``raise_exception`` of a template: its own message."""


class TooLong(Exception):
    """The text exceeds the limit of its request."""


class _Unmarked(Extension):
    """``{% generation %}`` marks the assistant's text for training: here it is only that text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it. An attribute that the sandbox hides is an error, also
    where it is only printed."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Unmarked, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _reject
        self.globals["strftime_now"] = _now

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse an attribute."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} object")


def render(request: dict[str, Any]) -> dict[str, str]:
    """The reply to a request."""
    try:
        return {"text": _text(**request)}
    except TooLong as error:
        cause, message = "limits", str(error)
    except Rejected as error:
        cause, message = "rejected", str(error)
    except jinja2.TemplateSyntaxError as error:
        cause, message = "syntax", f"line {error.lineno}: {error.message}"
    except SecurityError as error:
        cause, message = "forbidden", str(error)
    except (MemoryError, RecursionError, OverflowError):
        cause, message = "limits", "it needs more than 256 MiB of memory, or nests too deep"
    except Exception as error:  # noqa: BLE001 - a template may raise any
        cause, message = "failed", f"{type(error).__name__}: {error}"
    return {"cause": cause, "error": message[:_MAX_MESSAGE]}


def _text(template: str, variables: dict[str, Any], max_characters: int) -> str:
    pieces, size = [], 0
    for piece in Environment().from_string(template).generate(variables):
        size += len(piece)
        if size > max_characters:
            raise TooLong(f"it renders more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def serve(control: socket.socket) -> None:
    """Fork a child for each socket that arrives, until the server closes ``control``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    with suppress(OSError):
        os.nice(NICENESS)
    for limit, value in _LIMITS:
        resource.setrlimit(limit, (value, value))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        for descriptor in descriptors:
            with suppress(OSError), socket.socket(fileno=descriptor) as channel:
                if os.fork() == 0:
                    control.close()
                    _child(lambda: _answer(channel))


_LIMITS = (
    (resource.RLIMIT_AS, MEMORY_BYTES),
    (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 16),
)


def _child(work: Callable[[], None]) -> NoReturn:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))  # a new process begins at 0
        work()
    finally:
        os._exit(0)


def _answer(channel: socket.socket) -> None:
    channel.sendall(BEGUN)
    received = bytearray()
    while chunk := channel.recv(_CHUNK):
        received += chunk
    channel.sendall(json.dumps(render(json.loads(received))).encode())


def _reject(message: object) -> NoReturn:
    raise Rejected(str(message))


def _now(written: str) -> str:
    return datetime.now().astimezone().strftime(written)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


if __name__ == "__main__":
    serve(socket.socket(fileno=sys.stdin.fileno()))
