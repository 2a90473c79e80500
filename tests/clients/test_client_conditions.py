"""Preconditions, ETags and idempotency keys of both clients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from prefixd.client import (
    AsyncClient,
    Client,
    PreconditionFailedError,
    protocol,
    protocol_admin,
    protocol_users,
)
from prefixd.client.folders import TextContent
from prefixd.client.wire import Call

TAG = 'W/"7"'
BINDING = {"user": "ann", "prefix": "voice", "updated_at": "2026-11-28T00:00:00Z"}
FAILED = {"error": {"message": "it has another tag", "code": "precondition_failed"}}

CREATING: dict[str, Callable[[], Call[Any]]] = {
    "upload": lambda: protocol.upload("a", config=b"{}", weights=b""),
    "text": lambda: protocol.upload_text("a", "hi"),
    "artifact": lambda: protocol.upload_artifact("a", b""),
    "alias": lambda: protocol.set_alias("a", "prod", version=1),
    "rollback": lambda: protocol.rollback("a", version=1),
    "pin": lambda: protocol.pin("a"),
    "binding": lambda: protocol_users.bind_user("ann", "a"),
    "default": lambda: protocol_users.set_default("a"),
    "import": lambda: protocol_users.import_bindings(b""),
    "tenant": lambda: protocol_admin.create_tenant("a"),
    "key": protocol_admin.create_key,
    "rotation": lambda: protocol_admin.rotate_key("k"),
}


@pytest.mark.parametrize("kind", CREATING)
def test_each_call_that_creates_has_a_key_of_its_own(kind: str) -> None:
    keys = {CREATING[kind]().request.headers["idempotency-key"] for _ in range(3)}
    assert len(keys) == 3


def test_other_calls_have_no_key() -> None:
    for call in (protocol.delete_prefix("a"), protocol.patch_metadata("a", {}), protocol.warm("a")):
        assert "idempotency-key" not in call.request.headers
    assert protocol.complete("hi", model="a").request.headers == {}


def test_preconditions_are_sent_as_headers() -> None:
    for call in (
        protocol.delete_prefix("a", if_match=TAG),
        protocol.patch_metadata("a", {}, if_match=TAG),
        protocol_users.unbind_user("ann", if_match=TAG),
        protocol_users.remove_default(if_match=TAG),
    ):
        assert call.request.headers == {"if-match": TAG}
    headers = protocol_users.bind_user("ann", "a", if_none_match="*").request.headers
    assert headers["if-none-match"] == "*"
    assert "if-match" not in headers


def test_an_unknown_keyword_raises_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "prefix.txt").write_text("hi")

    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise AssertionError("nothing is sent")

    calls: dict[str, tuple[Any, ...]] = {
        "upload_folder": ("a", tmp_path),
        "upload_content": ("a", TextContent("hi")),
        "upload_text": ("a", "hi"),
        "upload_artifact": ("a", b""),
        "patch_metadata": ("a", {}),
        "set_recipe": ("a", {}),
        "remove_alias": ("a", "prod"),
        "pin": ("a",),
        "unpin": ("a",),
        "delete_version": ("a", 1),
        "delete_prefix": ("a",),
        "bind_user": ("ann", "a"),
        "unbind_user": ("ann",),
        "set_default": ("a",),
        "remove_default": (),
    }
    transport = httpx2.MockTransport(refuse)
    for client in (Client(transport=transport), AsyncClient(transport=transport)):
        for name, arguments in calls.items():
            method: Callable[..., Any] = getattr(client, name)
            with pytest.raises(TypeError, match=r"'if_mach'.*if_match and if_none_match"):
                method(*arguments, if_mach=TAG)
        upload_text: Callable[..., Any] = client.upload_text
        with pytest.raises(TypeError, match="'progress'"):
            upload_text("a", "hi", progress=print)


@pytest.mark.parametrize("name", ["complete", "chat", "stream_complete", "stream_chat"])
def test_whether_it_streams_is_decided_by_the_method(name: str) -> None:
    build: Callable[..., Any] = getattr(protocol, name)
    for keyword in ("stream", "stream_options"):
        with pytest.raises(TypeError, match=rf"'{keyword}'.*stream_complete or stream_chat"):
            build([], model="a", **{keyword: None})


class Server:
    """Refuses the first request as full, and then accepts the tag TAG."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if len(self.requests) == 1:
            return httpx2.Response(503, headers={"retry-after": "1"}, json=FAILED)
        if request.headers.get("if-match", TAG) != TAG:
            return httpx2.Response(412, json=FAILED)
        return httpx2.Response(200, headers={"etag": 'W/"8"'}, content=json.dumps(BINDING))


def check(server: Server, etag: str | None) -> None:
    assert etag == 'W/"8"'
    first, second = server.requests[:2]
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert [one.headers["if-match"] for one in server.requests] == [TAG, TAG, 'W/"6"']


def test_a_retry_has_the_same_key_and_a_response_its_tag() -> None:
    server = Server()
    transport = httpx2.MockTransport(server)
    with Client(transport=transport, sleep=lambda _: None) as client:
        bound = client.bind_user("ann", "voice", if_match=TAG)
        with pytest.raises(PreconditionFailedError):
            client.bind_user("ann", "voice", if_match='W/"6"')
    check(server, bound.etag)


def test_the_asynchronous_client_does_the_same() -> None:
    async def run() -> None:
        server = Server()

        async def no_sleep(_: float) -> None:
            pass

        transport = httpx2.MockTransport(server)
        async with AsyncClient(transport=transport, sleep=no_sleep) as client:
            bound = await client.bind_user("ann", "voice", if_match=TAG)
            with pytest.raises(PreconditionFailedError):
                await client.bind_user("ann", "voice", if_match='W/"6"')
        check(server, bound.etag)

    anyio.run(run)
