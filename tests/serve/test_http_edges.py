"""Requests that the parser or the server cannot delimit, on real sockets: each is refused in the
one shape, with a request id, and the connection is closed."""

import asyncio
import json

import pytest

from prefixd.server.errors import BadRequest, PrefixdError
from prefixd.server.serve.http_refusals import MAX_HEADER_BYTES, check_head
from tests.api.api_world import World
from tests.serve.listening import serve_port as serve

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
GET = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
CHUNKS = b"\r\n0\r\n\r\n"

UNKNOWN_CODINGS = {
    "gzip then chunked": b"transfer-encoding: gzip, chunked\r\n",
    "gzip": b"transfer-encoding: gzip\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "chunked twice in one line": b"transfer-encoding: chunked, chunked\r\n",
    "chunked twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
    "gzip and chunked in two lines": b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n",
    "chunked with a parameter": b"transfer-encoding: chunked;q=1\r\n",
    "an empty element": b"transfer-encoding: , chunked\r\n",
    "a longer name": b"transfer-encoding: xchunked\r\n",
    "nothing": b"transfer-encoding:\r\n",
}
MALFORMED = {
    "no target": (b"GET\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    "an unknown method": (b"BREW / HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "an unknown version": (b"GET / HTTP/9.1\r\nhost: x\r\n\r\n", 400),
    "a target in bytes": (b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "a space in a header's name": (GET + b"a b: x\r\n\r\n", 400),
    "two lengths": (POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n0", 400),
    "a negative length": (POST + b"content-length: -1\r\n\r\n0", 400),
    "both framings": (POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n" + CHUNKS, 400),
    "both, reversed": (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n" + CHUNKS, 400),
    "chunks in HTTP/1.0": (
        b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n" + CHUNKS,
        400,
    ),
    "a large header": (GET + b"a: " + b"b" * MAX_HEADER_BYTES + b"\r\n\r\n", 431),
    "many headers": (GET + b"a: b\r\n" * (MAX_HEADER_BYTES // 5) + b"\r\n", 431),
    "a long target": (b"GET /" + b"x" * MAX_HEADER_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
}


async def answer_to(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the only response; the server must close the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    response = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return parsed(response)


def parsed(response: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def check_refusal(response: tuple[int, dict[str, str], bytes], status: int, code: str) -> str:
    """Check a refusal; returns its request id."""
    received, headers, body = response
    error = json.loads(body)["error"]
    assert (received, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert headers["x-request-id"] == error["request_id"]
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    assert "date" in headers
    return str(error["request_id"])


def test_a_transfer_coding_other_than_chunked_is_not_implemented(world: World) -> None:
    async def scenario(port: int) -> None:
        for name, header in UNKNOWN_CODINGS.items():
            response = await answer_to(port, POST + header + CHUNKS)
            assert check_refusal(response, 501, "unsupported_transfer_coding"), name

    serve(world, 30, scenario)


@pytest.mark.parametrize("value", ["chunked", "Chunked", "  CHUNKED  "])
def test_chunked_is_read_in_any_case(world: World, value: str) -> None:
    body = b'{"model": "tiny"}'
    head = POST + b"authorization: Bearer " + world.keys["acme"].encode() + b"\r\n"
    head += b"content-type: application/json\r\nconnection: close\r\n"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)

    async def scenario(port: int) -> None:
        request = head + b"transfer-encoding: " + value.encode() + b"\r\n\r\n" + chunk
        status, _, answer = await answer_to(port, request)
        assert (status, json.loads(answer)["error"]["param"]) == (400, "prompt")

    serve(world, 30, scenario)


def test_malformed_requests_are_refused_in_the_one_shape(world: World) -> None:
    async def scenario(port: int) -> None:
        for request, status in MALFORMED.values():
            code = "invalid_http" if status == 400 else "request_head_too_large"
            request_id = check_refusal(await answer_to(port, request), status, code)
            assert request_id.startswith("req-")
        offered = await answer_to(
            port, GET + b"x-request-id: mine-1\r\na: b\r\nbad name: x\r\n\r\n"
        )
        assert check_refusal(offered, 400, "invalid_http") == "mine-1"

    serve(world, 30, scenario)


def test_a_bad_chunk_is_refused_while_the_application_waits_for_the_body(world: World) -> None:
    head = POST + b"authorization: Bearer " + world.keys["acme"].encode() + b"\r\n"
    head += b"content-type: application/json\r\nx-request-id: mine-2\r\n"

    async def scenario(port: int) -> None:
        request = head + b"transfer-encoding: chunked\r\n\r\nzz\r\n\r\n"
        assert check_refusal(await answer_to(port, request), 400, "invalid_http") == "mine-2"

    serve(world, 30, scenario)


def test_a_malformed_second_request_does_not_cut_the_first_response(world: World) -> None:
    """The response in progress ends complete, nothing is written into it, and the connection is
    closed, though the head timeout passes in the meantime."""
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 4, "stream": true}'
    head = POST + b"authorization: Bearer " + world.keys["acme"].encode() + b"\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    world.runner.gate.clear()

    async def scenario(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        assert await asyncio.to_thread(world.runner.entered.wait, 30)
        writer.write(b"GET / HTTP/9.1\r\n\r\n")
        writer.write(b"more of it\r\n")
        await asyncio.sleep(0.3)  # longer than the head timeout
        world.runner.gate.set()
        response = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        assert response.startswith(b"HTTP/1.1 200")
        assert response.count(b"HTTP/1.1") == 1
        assert response.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    world.engine.start()
    try:
        serve(world, 0.2, scenario)
    finally:
        world.runner.gate.set()
        world.engine.stop()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_both_framings_are_refused_even_if_the_parser_accepts_them(version: str) -> None:
    host = (b"host", b"x")
    both = [(b"transfer-encoding", b"chunked"), (b"content-length", b"3")]
    for headers in (both, both[::-1]):
        with pytest.raises(BadRequest, match="received both") as caught:
            check_head(b"/", [host, *headers], version)
        error: PrefixdError = caught.value
        assert error.code == "invalid_http"
    check_head(b"/", [host, (b"transfer-encoding", b"\tChunked ")], "1.1")
    check_head(b"/", [host, (b"content-length", b"3")], version)


def test_dot_segments_are_no_route_and_need_a_key(world: World) -> None:
    key = b"authorization: Bearer " + world.keys["acme"].encode() + b"\r\n"
    targets = (
        b"/v1/./models",
        b"/v1/users/../models",
        b"/v1/users/./prefix",
        b"/./v1/models",
        b"/v1/../v1/models",
        b"/v1/../health/live",
        b"/health/../v1/models",
        b"http://other/v1/models/",
    )

    async def scenario(port: int) -> None:
        for target in targets:
            head = b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            check_refusal(await answer_to(port, head + b"\r\n"), 401, "missing_api_key")
            check_refusal(await answer_to(port, head + key + b"\r\n"), 404, "unknown_route")

    serve(world, 30, scenario)


def test_head_has_no_body(world: World) -> None:
    async def scenario(port: int) -> None:
        for path in (b"/health/live", b"/health/ready", b"/metrics", b"/openapi.json"):
            head = b"HEAD " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            status, headers, body = await answer_to(port, head)
            assert (status, body) == (200, b""), path
            assert int(headers["content-length"]) > 0

    world.engine.start()
    try:
        serve(world, 30, scenario)
    finally:
        world.engine.stop()
