"""How many connections a server accepts, from whom, and what it does when it cannot accept any."""

import asyncio
import errno
import itertools
import resource
import socket
import struct
from contextlib import ExitStack, suppress
from typing import Any
from unittest.mock import Mock

import pytest
import structlog

from prefixd.server.api.metrics import ConnectionLimit, Metrics
from prefixd.server.serve.connection_limits import (
    ConnectionLimits,
    parse_networks,
    raise_descriptor_limit,
)
from prefixd.server.serve.connections import Connections
from tests.api.api_world import World
from tests.serve.listening import Listening, read_response, serve

ALIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


def connect(port: int, source: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))


async def call(connection: socket.socket) -> tuple[int, Any]:
    """Call /health/live over ``connection``; status and body."""
    connection.sendall(ALIVE)
    line, _, body = await asyncio.to_thread(read_response, connection)
    return int(line.split()[1]), body


def sample(world: World, name: str, **labels: str) -> float | None:
    return world.metrics.registry.get_sample_value(f"prefixd_{name}", labels)


def test_an_address_over_its_limit_is_refused_and_others_are_not(world: World) -> None:
    async def scenario(server: Listening) -> None:
        with ExitStack() as stack:
            held = [stack.enter_context(connect(server.port, "127.0.0.2")) for _ in range(3)]
            await server.until_connected(3)
            refused = stack.enter_context(connect(server.port, "127.0.0.2"))
            line, headers, body = await asyncio.to_thread(read_response, refused)
            assert line == b"HTTP/1.1 503 Service Unavailable\r\n"
            assert headers["connection"] == "close"
            assert int(headers["retry-after"]) > 0
            assert body["error"]["code"] == "too_many_connections"
            assert body["error"]["request_id"] == headers["x-request-id"]
            assert refused.recv(1) == b""
            other = stack.enter_context(connect(server.port, "127.0.0.1"))
            assert await call(other) == (200, {"status": "ok"})
            assert await call(held[0]) == (200, {"status": "ok"})
            assert sample(world, "connections") == 4
            held[1].close()
            await server.until_connected(3)
            again = stack.enter_context(connect(server.port, "127.0.0.2"))
            assert (await call(again))[0] == 200
        await server.until_connected(0)
        assert sample(world, "connections") == 0

    with structlog.testing.capture_logs() as logs:
        serve(world, scenario, limits=ConnectionLimits(6, 3))
    assert sample(world, "connections_refused_total", limit="address") == 1
    refusals = [line for line in logs if "refused connections" in line["event"]]
    assert [(line["limit"], line["client"]) for line in refusals] == [("address", "127.0.0.2")]


def test_idle_connections_from_many_addresses_keep_no_client_out(world: World) -> None:
    """At the total limit, the connection that has been idle for the longest is closed."""

    async def scenario(server: Listening) -> None:
        with ExitStack() as stack:
            held = []
            for number in (2, 3, 4):
                connection = stack.enter_context(connect(server.port, f"127.0.0.{number}"))
                await server.until_connected(number - 1)
                held.append(connection)
            assert (await call(held[0]))[0] == 200  # held[1] has now been idle for longer
            held[1].sendall(ALIVE[:10])  # a head that has no end is no request yet
            other = stack.enter_context(connect(server.port, "127.0.0.1"))
            assert (await call(other))[0] == 200
            with suppress(ConnectionResetError):
                assert held[1].recv(1) == b""
            assert (await call(held[0]))[0] == 200
            assert (await call(held[2]))[0] == 200

    serve(world, scenario, limits=ConnectionLimits(3, 3))
    assert sample(world, "connections_evicted_total") == 1


def test_connections_with_a_request_are_not_closed_for_new_ones(world: World) -> None:
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 2}'
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    head += f"authorization: Bearer {world.keys['acme']}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    world.runner.gate.clear()

    async def scenario(server: Listening) -> None:
        with connect(server.port, "127.0.0.2") as busy:
            busy.sendall(head.encode() + body)
            assert await asyncio.to_thread(world.runner.entered.wait, 30)
            with connect(server.port, "127.0.0.1") as other:
                line, _, _ = await asyncio.to_thread(read_response, other)
                assert line.startswith(b"HTTP/1.1 503")
            world.runner.gate.set()
            line, _, _ = await asyncio.to_thread(read_response, busy)
            assert line.startswith(b"HTTP/1.1 200")

    serve(world, scenario, limits=ConnectionLimits(1, 1))
    assert sample(world, "connections_refused_total", limit="total") == 1


def test_failures_to_accept_pause_and_are_logged_once_a_second(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
    calls = []

    class FailingSocket(socket.socket):
        """A listening socket that fails to accept, four times."""

        def accept(self) -> tuple[socket.socket, Any]:
            calls.append(asyncio.get_running_loop().time())
            if failures:
                code = failures.pop(0)
                raise OSError(code, errno.errorcode[code])
            return super().accept()

    def bind(host: str, port: int) -> socket.socket:
        listening = FailingSocket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind((host, port))
        return listening

    monkeypatch.setattr("tests.serve.listening.bind", bind)
    # A busy machine may take more than a second for all four.
    monkeypatch.setattr("prefixd.server.serve.logging._WARNING_INTERVAL_S", 3600.0)
    broken = Mock()

    async def scenario(server: Listening) -> None:
        asyncio.get_running_loop().set_exception_handler(broken)
        with connect(server.port, "127.0.0.1") as client:
            assert (await call(client))[0] == 200

    with structlog.testing.capture_logs() as logs:
        serve(world, scenario)
    assert sample(world, "accept_failures_total") == 4
    assert [line["why"] for line in logs if line["event"] == "cannot accept connections"] == [
        "EMFILE"
    ]
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(calls[:5]))
    broken.assert_not_called()


def test_connections_that_are_reset_before_they_are_accepted_are_not_counted(
    world: World,
) -> None:
    async def scenario(server: Listening) -> None:
        for _ in range(20):
            client = connect(server.port, "127.0.0.2")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # a reset; the server accepts after this scenario waits
        with connect(server.port, "127.0.0.2") as other:
            assert (await call(other))[0] == 200
            await server.until_connected(1)
            assert sample(world, "connections") == 1

    serve(world, scenario)


@pytest.fixture
def metrics(world: World) -> Metrics:
    return world.metrics


def test_addresses_are_counted_as_the_site_behind_them(metrics: Metrics) -> None:
    connections = Connections(ConnectionLimits(100, 1), metrics)
    assert connections.admit("2001:db8::1") is None
    assert connections.admit("2001:db8::ffff:1") is ConnectionLimit.ADDRESS
    assert connections.admit("2001:db8:0:1::1") is None
    assert connections.admit("192.0.2.1") is None
    assert connections.admit("::ffff:192.0.2.1") is ConnectionLimit.ADDRESS
    assert connections.admit("::ffff:192.0.2.2") is None
    connections.release("2001:db8::1")
    assert connections.admit("2001:db8::2") is None


def test_trusted_proxies_have_the_total_limit_alone(metrics: Metrics) -> None:
    trusted = parse_networks("10.0.0.0/8, 192.0.2.7,2001:db8::/32")
    connections = Connections(ConnectionLimits(4, 1, trusted), metrics)
    for address in ("10.1.2.3", "10.1.2.3", "::ffff:192.0.2.7", "2001:db8:1::1"):
        assert connections.admit(address) is None
    assert connections.admit("10.1.2.3") is ConnectionLimit.TOTAL
    connections.release("10.1.2.3")
    assert connections.admit("192.0.2.8") is None
    connections.release("10.1.2.3")
    assert connections.admit("192.0.2.8") is ConnectionLimit.ADDRESS


def test_the_default_limits_follow_from_the_descriptors() -> None:
    defaults = {"total": None, "per_address": None, "trusted": ""}
    limits = ConnectionLimits.of(descriptors=1000, **defaults)  # type: ignore[arg-type]
    assert limits == ConnectionLimits(750, 375)
    assert ConnectionLimits.of(
        descriptors=1000, total=100, per_address=None, trusted="127.0.0.1"
    ) == ConnectionLimits(100, 50, parse_networks("127.0.0.1/32"))


def test_the_limit_of_descriptors_is_raised_to_the_hard_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, new: limits.__setitem__(0, new[0]))
    assert raise_descriptor_limit() == 4096
    assert limits == [4096, 4096]


def test_a_hard_limit_that_cannot_be_set_leaves_the_soft_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", Mock(side_effect=ValueError("not allowed")))
    assert raise_descriptor_limit() == 256


@pytest.mark.parametrize("text", ["proxy.example", "10.0.0.0/40", "10.0.0.0/8;10.1.0.0/16"])
def test_a_network_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected addresses or networks like .* received"):
        parse_networks(text)


@pytest.mark.parametrize(
    ("text", "plain"),
    [("::ffff:10.0.0.0/104", "10.0.0.0/8"), ("::ffff:10.0.0.1", "10.0.0.1"), ("::/0", "::/0")],
)
def test_trusted_ipv4_addresses_may_be_written_as_ipv6(text: str, plain: str) -> None:
    assert parse_networks(text) == parse_networks(plain)
