"""How connections end: after a refusal with an unread body, and when a client stops reading."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import structlog

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.http import bind
from prefixd.server.serve.transport import LINGER_BYTES, LINGER_S, LingeringTransport
from tests.api.api_world import World
from tests.serve.listening import SOON_S, Listening, abort_of, read_response, serve

SEQUENCES = 4

PIECE = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
"""A part of a body: a chunk of 64 KiB, or just bytes."""

LONG = b"content-length: 100000000\r\n\r\n" + PIECE
CHUNKED = b"transfer-encoding: chunked\r\n\r\n" + PIECE
NEXT = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed connection ends soon: the client here keeps it to the last."""
    monkeypatch.setattr("prefixd.server.serve.transport.LINGER_S", 0.2)


def head(target: str, *lines: str) -> bytes:
    return "\r\n".join([f"{target} HTTP/1.1", "host: x", *lines, ""]).encode()


REFUSED: dict[str, tuple[int, Callable[[World], bytes]]] = {
    "no key, length": (401, lambda _: head("POST /v1/completions") + LONG),
    "no key, chunked": (401, lambda _: head("POST /v1/completions") + CHUNKED),
    "no key, head alone": (
        401,
        lambda _: head("PUT /v1/prefixes/a", "content-length: 9999999", ""),
    ),
    "no key, waits for 100": (
        401,
        lambda _: head("POST /v1/completions", "expect: 100-continue") + LONG,
    ),
    "no route": (404, lambda world: head("POST /v1/none", key(world)) + CHUNKED),
    "no method": (405, lambda world: head("POST /v1/models", key(world)) + LONG),
    "too large": (413, lambda world: head("POST /v1/completions", key(world), JSON) + LONG),
    "more than announced": (
        413,
        lambda world: head("POST /v1/completions", key(world), JSON) + CHUNKED + PIECE,
    ),
    "bad scope": (
        403,
        lambda world: head("PUT /v1/prefixes/a", key(world, "acme:generate")) + CHUNKED,
    ),
}
JSON = "content-type: application/json"


def key(world: World, name: str = "acme") -> str:
    return f"authorization: Bearer {world.keys[name]}"


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize("case", REFUSED)
def test_a_client_that_goes_on_sending_reads_the_whole_refusal(world: World, case: str) -> None:
    status, request = REFUSED[case]

    async def scenario(server: Listening) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            response = await asyncio.to_thread(send_on_and_read, client, request(world))
            line, headers, body = response
            assert line.startswith(b"HTTP/1.1 %d " % status)
            assert headers["connection"] == "close"
            assert body["error"]["request_id"] == headers["x-request-id"]
            # The client stays, and would send on: the server ends the connection.
            await server.until_connected(0)

    serve(world, scenario)


def send_on_and_read(client: socket.socket, request: bytes) -> tuple[bytes, dict[str, str], Any]:
    """Send ``request`` and parts of a body as long as the server reads, then read the response."""
    client.sendall(request)
    with suppress(ConnectionError, TimeoutError):
        for _ in range(64):
            client.sendall(PIECE)
    response = read_response(client)
    assert_ended(client)
    return response


def assert_ended(client: socket.socket) -> None:
    """The response is the last: the requests behind it are not answered."""
    with suppress(ConnectionResetError):
        assert client.recv(1) == b""


def test_a_client_that_sends_slowly_reads_the_refusal_and_its_end_at_once(world: World) -> None:
    """The end of the response does not wait for the end of the body or of the linger time."""

    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head("POST /v1/completions", "content-length: 1000", "") + b"{")
        response = await asyncio.wait_for(reader.read(), 30)
        assert response.startswith(b"HTTP/1.1 401")
        assert len(server.server_state.connections) == 1
        while server.server_state.connections:
            writer.write(b"x")
            await asyncio.sleep(0.01)
        writer.close()

    serve(world, scenario)


@pytest.mark.usefixtures("short_linger")
def test_requests_behind_an_unread_body_are_not_run(world: World) -> None:
    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head("POST /v1/completions", "content-length: 100", "") + b"{")
        response = await asyncio.wait_for(reader.read(), 30)
        writer.write(b" " * 99 + NEXT)
        await server.until_connected(0)
        assert response.count(b"HTTP/1.1") == 1
        assert await reader.read() == b""
        writer.close()

    serve(world, scenario)
    live = {"method": "GET", "route": "/health/live", "status": "200"}
    assert world.metrics.registry.get_sample_value("prefixd_http_requests_total", live) is None


def test_a_refusal_with_a_body_that_has_arrived_keeps_the_connection(world: World) -> None:
    async def scenario(server: Listening) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            for refused in ("POST /v1/completions", "POST /v1/none", "PUT /v1/prefixes/a"):
                whole = head(refused, "content-length: 2", "") + b"{}"
                client.sendall(whole)
                line, headers, _ = await asyncio.to_thread(read_response, client)
                assert line.startswith(b"HTTP/1.1 4")
                assert "connection" not in headers
            client.sendall(NEXT)
            line, _, _ = await asyncio.to_thread(read_response, client)
            assert line.startswith(b"HTTP/1.1 200")

    serve(world, scenario)


@pytest.mark.usefixtures("short_linger")
def test_a_parser_error_is_read_by_a_client_that_goes_on_sending(world: World) -> None:
    async def scenario(server: Listening) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(b"no request\r\n\r\n" + PIECE)
            received = await asyncio.to_thread(read_all, client)
            assert received.startswith(b"HTTP/1.1 400")
            assert b"connection: close\r\n" in received
            await server.until_connected(0)

    serve(world, scenario)


def read_all(client: socket.socket) -> bytes:
    received = b""
    while piece := client.recv(65536):
        received += piece
    return received


def unnamed_protocol(family: socket.AddressFamily, address: str) -> socket.socket:
    """A bound socket as other programs make it: without the name of the protocol."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    return listener


@pytest.mark.parametrize(
    "listening",
    [
        partial(bind, "127.0.0.1", 0),
        partial(unnamed_protocol, socket.AF_INET, "127.0.0.1"),
        partial(unnamed_protocol, socket.AF_INET6, "::1"),
    ],
    ids=["bind", "ipv4", "ipv6"],
)
def test_accepted_connections_send_without_delay(
    world: World, listening: Callable[[], socket.socket]
) -> None:
    try:
        listener = listening()
    except OSError:
        pytest.skip("this machine has no IPv6")

    async def scenario(server: Listening) -> None:
        address, port = server.servers[0].sockets[0].getsockname()[:2]
        _, writer = await asyncio.open_connection(address, port)
        await server.until_connected(1)
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        writer.close()

    serve(world, scenario, listener=listener)


def test_a_unix_socket_is_served(world: World, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))

    async def scenario(_server: Listening) -> None:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()

    serve(world, scenario, listener=listener)


def test_a_stream_whose_client_stops_reading_is_aborted(world: World) -> None:
    """Its sequences end long before their last token, and their blocks are free."""
    body = {"model": "tiny", "prompt": "x", "ignore_eos": True, "stream": True}
    run, aborted = world.runner.run, abort_of(world)

    def run_until_full(step: Step) -> StepOutput:
        """After 60 steps the client's window is full: the next ones wait for the abort."""
        assert len(world.runner.steps) < 60 or aborted.wait(SOON_S)
        return run(step)

    world.runner.run = run_until_full  # type: ignore[method-assign]
    stall(world, {**body, "n": SEQUENCES, "max_tokens": 100})
    assert world.engine.stats().finished["abort"] == SEQUENCES
    assert len(world.runner.steps) < 100
    world.engine.core.scheduler.check_integrity()


def test_a_client_that_does_not_read_a_whole_response_is_disconnected(world: World) -> None:
    body = {"model": "tiny", "prompt": "x", "ignore_eos": True, "max_tokens": 390, "logprobs": 5}
    stall(world, body)


def stall(world: World, body: dict[str, Any]) -> None:
    """Send ``body`` for a generation and read nothing, until the server disconnects."""
    content = json.dumps(body).encode()
    request = head("POST /v1/completions", key(world), JSON, f"content-length: {len(content)}", "")

    async def scenario(server: Listening) -> None:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", server.port))
            client.sendall(request + content)
            await server.until_connected(1)
            await server.until_connected(0)
            async with asyncio.timeout(SOON_S):
                while not world.engine.idle:  # noqa: ASYNC110 - the engine has no event for it
                    await asyncio.sleep(0.01)

    with structlog.testing.capture_logs() as logs:
        serve(world, scenario, write_s=0.2)
    assert world.metrics.registry.get_sample_value("prefixd_write_timeouts_total") == 1
    stalled = [line for line in logs if "stopped reading" in line["event"]]
    assert [line["client"] for line in stalled] == ["127.0.0.1"]


class ManualLoop:
    """A loop whose time passes when a test lets it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Mock:
        self._timers.append((self.now + delay, callback))
        return Mock()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self._timers if timer[0] <= end]:
            timer = min(due, key=lambda timer: timer[0])
            self._timers.remove(timer)
            self.now = timer[0]
            timer[1]()
        self.now = end


class Unread:
    """An inner transport whose client takes what the test says."""

    def __init__(self) -> None:
        self.outstanding = 0
        self.calls: list[str] = []

    def write(self, data: bytes) -> None:
        self.outstanding += len(data)

    def get_write_buffer_size(self) -> int:
        return self.outstanding

    def get_extra_info(self, _name: str, _default: Any = None) -> Mock:
        return Mock(fileno=lambda: -1)

    def is_closing(self) -> bool:
        return "abort" in self.calls

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.calls.append(name)


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def unread() -> Unread:
    return Unread()


@pytest.fixture
def on_stall() -> Mock:
    return Mock()


@pytest.fixture
def transport(loop: ManualLoop, unread: Unread, on_stall: Mock) -> LingeringTransport:
    inner = cast("asyncio.Transport", unread)
    events = cast("asyncio.AbstractEventLoop", loop)
    return LingeringTransport(inner, events, write_timeout_s=10, on_stall=on_stall)


def test_a_slow_client_stays_connected_and_one_that_stops_does_not(
    transport: LingeringTransport, loop: ManualLoop, unread: Unread, on_stall: Mock
) -> None:
    transport.write(b"x" * 1000)
    for _ in range(20):
        loop.advance(9)
        unread.outstanding -= 1
    assert not unread.calls
    loop.advance(9)
    on_stall.assert_not_called()
    loop.advance(5)
    on_stall.assert_called_once_with()
    assert unread.calls == ["abort"]


def test_a_client_that_took_everything_is_never_late(
    transport: LingeringTransport, loop: ManualLoop, unread: Unread, on_stall: Mock
) -> None:
    for _ in range(20):
        transport.write(b"x")
        unread.outstanding = 0
        loop.advance(100)
    transport.write(b"x")
    loop.advance(9)
    on_stall.assert_not_called()
    loop.advance(6)
    on_stall.assert_called_once_with()


def test_a_closed_connection_discards_a_bounded_number_of_bytes_for_a_bounded_time(
    transport: LingeringTransport, loop: ManualLoop, unread: Unread
) -> None:
    transport.write(b"refused")
    unread.outstanding = 0
    transport.close()
    transport.write(b"more")
    assert unread.outstanding == 0
    assert unread.calls == ["resume_reading", "write_eof"]
    transport.discard(b"x" * LINGER_BYTES)
    assert len(unread.calls) == 2
    transport.discard(b"x")
    assert unread.calls[2:] == ["pause_reading"]
    loop.advance(LINGER_S - 0.01)
    assert len(unread.calls) == 3
    loop.advance(0.01)
    assert unread.calls[3:] == ["abort"]


def test_what_was_held_is_sent_by_close_and_not_after_abort(
    transport: LingeringTransport, unread: Unread
) -> None:
    transport.hold()
    transport.write(b"head")
    transport.hold()
    transport.write(b"er")
    assert unread.outstanding == 0
    transport.close()
    assert unread.outstanding == len("header")
    transport.release()
    assert unread.outstanding == len("header")


def test_nothing_is_written_after_an_abort(transport: LingeringTransport, unread: Unread) -> None:
    transport.hold()
    transport.write(b"head")
    transport.abort()
    transport.release()
    assert unread.outstanding == 0


def test_an_answer_that_was_not_taken_yet_outlasts_the_linger_time(
    transport: LingeringTransport, loop: ManualLoop, unread: Unread, on_stall: Mock
) -> None:
    transport.write(b"refused")
    transport.close()
    loop.advance(5 * LINGER_S)
    assert "abort" not in unread.calls
    unread.outstanding = 0
    loop.advance(LINGER_S)
    assert unread.calls[-1] == "abort"
    assert not on_stall.called
