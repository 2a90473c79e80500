"""``PREFIXD_USER_HEADER``: the end user of a request in a header of the operator's choice."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from pydantic import ValidationError

from prefixd.server.api.generate.requests import CompletionRequest
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.errors import BadRequest
from prefixd.server.serve.settings import Settings
from tests.api.api_world import World, error_of, put_text

HEADER = "X-OpenWebUI-User-Id"
TURN = {"role": "user", "content": "hi"}


@pytest.fixture
def frontend(world: World) -> Iterator[TestClient]:
    """A server that takes HEADER; ann is bound to ``voice``, the others get ``shared``."""
    app = world.make_app(user_header=HEADER)
    with TestClient(app, headers=world.headers()) as client:
        put_text(client, "voice", "Be kind.", world.headers())
        put_text(client, "shared", "Be short.", world.headers())
        assert client.put("/v1/users/ann/prefix", json={"prefix": "voice"}).status_code == 200
        assert client.put("/v1/default/prefix", json={"prefix": "shared"}).status_code == 200
        yield client


def ask(client: TestClient, *users: str | bytes, chat: bool = False, **fields: Any) -> Any:
    names: list[tuple[str | bytes, str | bytes]] = [(HEADER.encode(), user) for user in users]
    prompt = {"messages": [TURN]} if chat else {"prompt": "hi"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": "tiny", "max_tokens": 2, **prompt, **fields}
    headers = [*client.headers.raw, *((n, u) for n, u in names)]
    return client.post(path, json=body, headers=headers)  # type: ignore[arg-type]


def used(answer: Any) -> tuple[str, str] | None:
    assert answer.status_code == 200, answer.text
    prefix = answer.json()["prefix"]
    return prefix and (prefix["name"], prefix["chosen_by"])


@pytest.mark.parametrize("chat", [False, True])
def test_the_header_chooses_the_prefix_of_its_user(frontend: TestClient, chat: bool) -> None:
    assert used(ask(frontend, "ann", chat=chat)) == ("voice", "user")
    assert used(ask(frontend, "bob", chat=chat)) == ("shared", "default")
    assert used(ask(frontend, chat=chat)) is None


def test_the_body_wins_over_the_header(frontend: TestClient) -> None:
    assert used(ask(frontend, "ann", user="bob")) == ("shared", "default")
    assert used(ask(frontend, "ann", user=None)) == ("voice", "user")


def test_the_header_has_no_effect_where_it_is_not_set(client: TestClient, world: World) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"})
    assert used(ask(client, "ann")) is None
    assert used(ask(client, b"\xff" * 9)) is None


def test_a_user_in_utf_8_is_the_same_as_in_a_body(frontend: TestClient) -> None:
    frontend.put("/v1/users/zo\u00eb/prefix", json={"prefix": "voice"})
    assert used(ask(frontend, "zo\u00eb".encode())) == ("voice", "user")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([""], "0 characters"),
        (["x" * 257], "257 characters"),
        ([b"a\x01b"], "U+0001"),
        (["a\u202eb".encode()], "U+202E"),
        (["ann", "bob"], "2 times"),
    ],
)
def test_other_values_are_a_bad_request(
    frontend: TestClient, values: list[str | bytes], words: str
) -> None:
    answer = ask(frontend, *values)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("invalid_request", HEADER)
    assert words in error["message"]
    assert HEADER in error["message"]


def test_a_value_that_is_not_utf_8_is_a_bad_request() -> None:
    # The client of the other tests encodes what it sends.
    scope = {"type": "http", "headers": [(HEADER.lower().encode(), b"\xff\xfe")]}
    body = CompletionRequest(model="tiny", prompt="hi")
    with pytest.raises(BadRequest, match="UTF-8") as refused:
        with_user(body, Request(scope), HEADER)
    assert refused.value.param == HEADER


def test_a_user_of_another_tenant_is_not_found_by_the_header(
    frontend: TestClient, world: World
) -> None:
    answer = frontend.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "hi", "max_tokens": 2},
        headers={HEADER: "ann", **world.headers("beta")},
    )
    assert used(answer) is None


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r\nb", "1", "Authorization", "x" * 65])
def test_a_setting_that_is_no_header_is_refused(name: str) -> None:
    if not name:  # an empty variable of the environment is none
        assert not Settings(user_header=name).user_header
        return
    with pytest.raises(ValidationError, match="X-OpenWebUI-User-Id"):
        Settings(user_header=name)
