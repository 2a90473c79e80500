"""Where a request ends and what belongs to its head, on real sockets: trailers, Upgrade, Host,
versions, and requests behind the one that is being answered."""

import asyncio
import json
import re

import pytest

from prefixd.server.errors import BadRequest
from prefixd.server.serve.http_refusals import MAX_HEADER_BYTES, check_head
from tests.api.api_world import World
from tests.serve.listening import Listening, abort_of, serve
from tests.serve.test_http_edges import GET, POST, answer_to, check_refusal

UPGRADE = b"connection: upgrade\r\nupgrade: h2c\r\n"
LAST = GET + b"connection: close\r\n\r\n"


def post(world: World, body: bytes, *lines: bytes) -> bytes:
    key = b"authorization: Bearer " + world.keys["acme"].encode()
    head = [key, b"content-type: application/json", b"content-length: %d" % len(body), *lines]
    return POST + b"\r\n".join([*head, b"", body])


async def statuses(port: int, *pieces: bytes) -> list[int]:
    """The statuses of all responses until the server closes; pieces are sent one by one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.05)  # a piece of its own, where the kernel allows
    response = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", response)]


def test_a_trailer_is_no_header(world: World) -> None:
    chunked = (
        b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    )
    key = b"authorization: Bearer " + world.keys["acme"].encode() + b"\r\n"

    async def scenario(server: Listening) -> None:
        request = POST + b"connection: close\r\n" + chunked + key + b"\r\n"
        status, _, body = await answer_to(server.port, request)
        assert (status, json.loads(body)["error"]["code"]) == (401, "missing_api_key")

    serve(world, scenario)


@pytest.mark.parametrize(
    "overhead", [b"0\r\n" + b"a: b\r\n" * 30_000, b"0\r\na: " + b"b" * 200_000]
)
def test_trailers_are_limited(world: World, overhead: bytes) -> None:
    key = b"authorization: Bearer " + world.keys["acme"].encode() + b"\r\n"
    head = POST + key + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"

    async def scenario(server: Listening) -> None:
        response = await answer_to(server.port, head + b"2\r\n{}\r\n" + overhead)
        check_refusal(response, 431, "request_head_too_large")

    assert len(overhead) > 2 * MAX_HEADER_BYTES
    serve(world, scenario)


@pytest.mark.parametrize("apart", [False, True])
def test_upgrade_is_ignored(world: World, apart: bool) -> None:
    """The body belongs to the request, is no request of its own, and the next one is answered."""
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 2, "user": "%s"}' % (GET + b"\r\n")
    body = body.replace(b"\r\n", b" ")
    request = post(world, body, *UPGRADE.split(b"\r\n")[:2])
    head, _, _ = request.partition(body)

    async def scenario(server: Listening) -> None:
        chunks = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        for first, second in ((head, body), (chunks, chunked)):
            pieces = (first, second, LAST) if apart else (first + second + LAST,)
            assert await statuses(server.port, *pieces) == [200, 200]
        bodyless = GET + UPGRADE + b"\r\n"
        assert await statuses(server.port, bodyless * 200 + LAST) == [200] * 201

    serve(world, scenario)


def test_a_body_behind_connect_is_no_request(world: World) -> None:
    inner = GET + b"\r\n"
    connect = b"CONNECT /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(inner)

    async def scenario(server: Listening) -> None:
        assert await statuses(server.port, connect, inner, LAST) in ([401], [401, 200])

    serve(world, scenario)


@pytest.mark.parametrize(
    ("headers", "version", "reason"),
    [
        ([], "1.1", "one Host header; received 0"),
        ([(b"host", b"x"), (b"host", b"y")], "1.1", "one Host header; received 2"),
        ([(b"host", b"x"), (b"host", b"x")], "1.0", "one Host header; received 2"),
        ([(b"host", b"x")], "2.0", "HTTP/1.1; received HTTP/2.0"),
        ([], "0.9", "HTTP/1.1; received HTTP/0.9"),
    ],
)
def test_host_and_version(headers: list[tuple[bytes, bytes]], version: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        check_head(b"/", headers, version)
    check_head(b"/", [], "1.0")


def test_a_broken_body_behind_another_request_is_refused_after_its_response(world: World) -> None:
    good = post(world, b'{"model": "tiny", "prompt": "x", "max_tokens": 2}')
    broken = good.partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\nzz\r\n"

    async def scenario(server: Listening) -> None:
        assert await statuses(server.port, good + broken) == [200, 400]
        assert await statuses(server.port, good + good + broken) == [200, 200, 400]

    serve(world, scenario)


def test_a_disconnect_aborts_a_request_that_has_another_behind_it(world: World) -> None:
    """uvicorn alone tells only the request that was received last."""
    endless = (
        b'{"model": "tiny", "prompt": "x", "max_tokens": 300, "ignore_eos": true, "stream": true}'
    )
    world.runner.hold_after = 3
    aborted = abort_of(world)

    async def scenario(server: Listening) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(world, endless) + GET + b"\r\n")
        assert await asyncio.to_thread(world.runner.held.wait, 30)
        writer.transport.abort()
        assert await asyncio.to_thread(aborted.wait, 30)
        world.runner.gate.set()
        await asyncio.to_thread(world.engine.state)  # answered after the abort
        assert world.engine.stats().finished["abort"] == 1

    serve(world, scenario)


def test_line_ends_between_requests_do_not_keep_a_connection(world: World) -> None:
    async def scenario(server: Listening) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(GET + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.05)
        writer.write(b"\r\n")
        await asyncio.wait_for(reader.read(), 30)
        writer.close()

    serve(world, scenario, header_s=0.2)
