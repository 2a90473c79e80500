"""Conditional requests: entity tags, If-Match and If-None-Match of every resource."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.store.names import BlobKey
from tests.api.api_world import World, error_of, put_text

_number = itertools.count()

BINDING = {"prefix": "voice"}
RESOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prefix": ("/v1/prefixes/voice", "PUT", {"kind": "text", "text": "hello"}),
    "version": ("/v1/prefixes/voice/versions/1", "PATCH", {"note": "x"}),
    "alias": ("/v1/prefixes/voice/aliases/prod", "PUT", {"version": 1}),
    "latest": ("/v1/prefixes/voice/aliases/latest", "PUT", {"version": 1}),
    "binding": ("/v1/users/ann/prefix", "PUT", BINDING),
    "default": ("/v1/default/prefix", "PUT", BINDING),
}
CREATED = ("prefix", "alias", "binding", "default")
every = pytest.mark.parametrize("kind", RESOURCES)
created = pytest.mark.parametrize("kind", CREATED)


def write(client: TestClient, kind: str, **headers: str) -> Any:
    """A write to the resource. ``if_match`` stands for If-Match."""
    path, method, body = RESOURCES[kind]
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request(method, path, json=body, headers=sent)


def make(client: TestClient, kind: str) -> str:
    """Create the resource; its tag."""
    put_text(client, "voice", "hello", {})
    answer = write(client, kind)
    assert answer.status_code in {200, 201}, answer.text
    return str(answer.headers["etag"])


def number_of(tag: str) -> int:
    assert tag.startswith('W/"')
    return int(tag[3:-1])


@every
def test_a_read_has_the_tag_of_the_last_write_and_is_304_until_the_next(
    client: TestClient, kind: str
) -> None:
    tag, path = make(client, kind), RESOURCES[kind][0]
    shown = client.get(path)
    assert shown.headers["etag"] == tag
    for sent in (tag, tag.removeprefix("W/"), f'"x", {tag}', "*"):
        same = client.get(path, headers={"If-None-Match": sent})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    newer = write(client, kind).headers["etag"]
    assert number_of(newer) > number_of(tag)
    answer = client.get(path, headers={"If-None-Match": tag})
    assert (answer.status_code, answer.headers["etag"]) == (200, newer)
    assert client.get(path, headers={"If-Match": tag}).status_code == 412
    assert client.get(path, headers={"If-Match": newer}).status_code == 200


@every
def test_a_write_with_an_outdated_tag_changes_nothing(client: TestClient, kind: str) -> None:
    tag, path = make(client, kind), RESOURCES[kind][0]
    written = write(client, kind, if_match=tag)
    assert written.status_code == 200
    newer = written.headers["etag"]
    refused = write(client, kind, if_match=tag)
    assert refused.status_code == 412
    error = error_of(refused)
    assert (error["code"], error["param"]) == ("precondition_failed", "If-Match")
    assert newer in error["message"]
    assert client.get(path).headers["etag"] == newer
    assert write(client, kind, if_match=f'"0", {newer}').status_code == 200
    assert write(client, kind, if_match="*").status_code == 200


@pytest.mark.parametrize("kind", [*CREATED, "version"])
def test_a_delete_compares_the_tag(client: TestClient, kind: str) -> None:
    tag, path = make(client, kind), RESOURCES[kind][0]
    newer = write(client, kind).headers["etag"]
    assert client.delete(path, headers={"If-Match": tag}).status_code == 412
    assert client.get(path).headers["etag"] == newer
    assert client.delete(path, headers={"If-Match": newer}).status_code == 204
    # Without the resource there is no other answer than without the header.
    assert client.delete(path, headers={"If-Match": newer}).status_code == 404


@created
def test_a_tag_is_not_used_again_after_a_deletion(client: TestClient, kind: str) -> None:
    seen, path = [number_of(make(client, kind))], RESOURCES[kind][0]
    for _ in range(3):
        assert client.delete(path).status_code == 204
        answer = write(client, kind)
        assert answer.status_code in {200, 201}
        seen.append(number_of(answer.headers["etag"]))
    assert sorted(set(seen)) == seen


@created
def test_a_star_in_if_none_match_only_creates(client: TestClient, kind: str) -> None:
    if kind != "prefix":
        put_text(client, "voice", "hello", {})
    path = RESOURCES[kind][0]
    assert write(client, kind, if_match="*").status_code == 412
    assert write(client, kind, if_match='W/"1"').status_code == 412
    assert client.get(path).status_code == 404
    first = write(client, kind, if_none_match="*")
    assert first.status_code in {200, 201}
    refused = write(client, kind, if_none_match="*")
    assert (refused.status_code, error_of(refused)["param"]) == (412, "If-None-Match")
    assert client.get(path).headers["etag"] == first.headers["etag"]
    assert client.delete(path).status_code == 204
    assert write(client, kind, if_none_match="*").status_code in {200, 201}


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize(
    "value", ["", "7", "W/7", 'w/"7"', '"7', '*, "7"', '"7" "8"', ",", '"a b"']
)
def test_a_malformed_precondition_is_a_400(client: TestClient, header: str, value: str) -> None:
    make(client, "binding")
    for answer in (
        client.get("/v1/users/ann/prefix", headers={header: value}),
        client.put("/v1/users/ann/prefix", json=BINDING, headers={header: value}),
        client.get("/v1/prefixes/voice/versions/1/content", headers={header: value}),
    ):
        assert answer.status_code == 400, value
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("invalid_precondition", header)


def test_a_precondition_may_come_in_several_lines(client: TestClient) -> None:
    tag = make(client, "binding")
    lines = [("If-Match", '"other"'), ("If-Match", tag)]
    assert client.put("/v1/users/ann/prefix", json=BINDING, headers=lines).status_code == 200


@every
def test_of_writers_with_the_same_tag_one_wins(either_client: TestClient, kind: str) -> None:
    client = either_client
    tag = make(client, kind)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: write(client, kind, if_match=tag), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200, *[412] * 7]


@created
def test_of_writers_that_create_one_wins(either_client: TestClient, kind: str) -> None:
    client = either_client
    if kind != "prefix":
        put_text(client, "voice", "hello", {})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: write(client, kind, if_none_match="*"), range(8)))
    assert sorted(answer.status_code for answer in answers)[1:] == [412] * 7
    assert min(answer.status_code for answer in answers) in {200, 201}


def tags(client: TestClient) -> dict[str, str]:
    paths = {"prefix": "voice", "one": "voice@1", "prod": "voice/aliases/prod"}
    shown = {name: client.get(f"/v1/prefixes/{path}") for name, path in paths.items()}
    return {
        name: answer.headers["etag"] for name, answer in shown.items() if "etag" in answer.headers
    }


def test_every_write_that_a_manifest_shows_changes_its_tag(client: TestClient) -> None:
    """Publishing, rollback, aliases, pins and metadata: a 304 never hides one of them."""
    put_text(client, "voice", "hello", {})
    before = tags(client)
    for method, path, body in (
        ("PUT", "/aliases/prod", {"version": 1}),  # version 1 gets an alias
        ("PUT", "", {"kind": "text", "text": "newer"}),  # and loses latest
        ("PUT", "/aliases/latest", {"version": 1}),
        ("PUT", "/aliases/prod", {"version": 2}),
        ("PUT", "/aliases/prod", {"version": 1}),
        ("PUT", "/pin", None),
        ("DELETE", "/pin", None),
        ("PATCH", "/versions/1", {"note": 1}),
        ("DELETE", "/aliases/prod", None),
        ("PUT", "/aliases/latest", {"version": 2}),
        ("DELETE", "/versions/2", None),  # latest falls back to version 1
    ):
        answer = client.request(method, f"/v1/prefixes/voice{path}", json=body)
        assert answer.status_code in {200, 201, 204}, answer.text
        after = tags(client)
        assert all(after[name] != tag for name, tag in before.items() if name in after), path
        before = after


def test_a_version_and_an_alias_also_take_the_tag_of_their_prefix(client: TestClient) -> None:
    make(client, "alias")
    for kind in ("version", "alias", "latest"):
        put_text(client, "other", f"{next(_number)}", {})  # raises no revision of voice
        tag = client.get("/v1/prefixes/voice").headers["etag"]
        assert write(client, kind, if_match=tag).status_code == 200
        assert write(client, kind, if_match=tag).status_code == 412


def test_the_tag_of_an_alias_stays_valid_while_others_publish(client: TestClient) -> None:
    """Only a write to the alias, or to the version it means, is unseen by its writer."""
    tag = make(client, "alias")
    put_text(client, "voice", "newer", {})
    moved = write(client, "alias", if_match=tag)
    assert moved.status_code == 200
    assert write(client, "alias", if_match=tag).status_code == 412


def test_an_import_raises_the_revision_of_each_binding(client: TestClient) -> None:
    tag = make(client, "binding")
    lines = b'{"user": "ann", "prefix": "voice"}\n{"user": "bob", "prefix": "voice"}'
    ndjson = {"content-type": "application/x-ndjson"}
    client.post("/v1/users/bindings:import", content=lines, headers=ndjson)
    assert write(client, "binding", if_match=tag).status_code == 412


def test_damage_changes_the_tag_and_the_former_one_still_matches_for_a_write(
    client: TestClient, world: World
) -> None:
    tag = make(client, "prefix")
    digest = client.get("/v1/prefixes/voice").json()["digest"]
    world.store._report_corrupt(BlobKey("acme", digest), "a test")
    damaged = client.get("/v1/prefixes/voice", headers={"If-None-Match": tag})
    assert (damaged.status_code, damaged.json()["corrupt"]) == (200, True)
    assert damaged.headers["etag"] != tag
    assert write(client, "prefix", if_match=damaged.headers["etag"]).status_code == 200
    assert client.get("/v1/prefixes/voice").json()["corrupt"] is False


def test_a_pin_takes_the_tag_of_the_version_or_the_prefix(client: TestClient) -> None:
    tag = make(client, "prefix")
    pinned = client.put("/v1/prefixes/voice/pin", headers={"If-Match": tag})
    assert pinned.status_code == 200
    assert client.put("/v1/prefixes/voice/pin", headers={"If-Match": tag}).status_code == 412
    assert client.delete("/v1/prefixes/voice/pin", headers={"If-Match": tag}).status_code == 412
    newer = {"If-Match": pinned.headers["etag"]}
    assert client.delete("/v1/prefixes/voice/pin", headers=newer).status_code == 204


# ── The stored file ──────────────────────────────────────────────────────────────────────────

CONTENT = "/v1/prefixes/voice/versions/latest/content"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"If-None-Match": "TAG"}, 304),
        ({"If-None-Match": "W/TAG"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": "TAG", "Range": "bytes=0-3"}, 304),
        ({"If-Match": "TAG"}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": "W/TAG"}, 412),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": '"other"', "If-None-Match": "TAG"}, 412),
        ({"Range": "bytes=0-3"}, 206),
        ({"Range": "BYTES=0-3"}, 206),
        ({"If-Match": "TAG", "Range": "bytes=0-3"}, 206),
        ({"If-Match": '"other"', "Range": "bytes=0-3"}, 412),
        ({"If-Range": "TAG", "Range": "bytes=0-3"}, 206),
        ({"If-Range": "W/TAG", "Range": "bytes=0-3"}, 200),
        ({"If-Range": '"other"', "Range": "bytes=0-3"}, 200),
        ({"If-Range": "DATE", "Range": "bytes=0-3"}, 200),
        ({"If-Range": '"other"', "Range": "bytes=99999-"}, 200),
        ({"If-Range": "TAG", "Range": "bytes=99999-"}, 416),
        ({"Range": "pages=1-2"}, 200),
        ({"Range": "bytes=-0"}, 416),
        ({"Range": "bytes=99999-"}, 416),
        ({"Range": "bytes=3-1"}, 400),
        ({"Range": "bytes=1_0-"}, 400),
        ({"Range": "bytes=--5"}, 400),
        ({"Range": "bytes=a-"}, 400),
        ({"Range": "bytes"}, 400),
    ],
    ids=str,
)
def test_the_stored_file_answers_preconditions_and_ranges(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    digest = put_text(client, "voice", "hello", {})["digest"]
    whole = client.get(CONTENT)
    assert whole.headers["etag"] == f'"{digest}"'
    date = whole.headers["last-modified"]
    sent = {
        name: value.replace("TAG", f'"{digest}"').replace("DATE", date)
        for name, value in headers.items()
    }
    answer = client.get(CONTENT, headers=sent)
    assert answer.status_code == status
    if status in {200, 206}:
        assert answer.content == (whole.content if status == 200 else whole.content[:4])
    if status in {200, 206, 304}:
        assert answer.headers["etag"] == f'"{digest}"'
    if status == 304:
        assert answer.content == b""


def test_of_several_ranges_those_within_the_file_are_sent(client: TestClient) -> None:
    put_text(client, "voice", "hello", {})
    whole = client.get(CONTENT).content
    answer = client.get(CONTENT, headers={"Range": "bytes=99999-, 2-5"})
    assert (answer.status_code, answer.content) == (206, whole[2:6])
    assert answer.headers["content-range"] == f"bytes 2-5/{len(whole)}"
    answer = client.get(CONTENT, headers={"Range": "bytes=0-1,-2"})
    assert answer.headers["content-type"].startswith("multipart/byteranges")
    assert whole[-2:] in answer.content


def test_a_part_of_another_version_is_never_sent(client: TestClient) -> None:
    """`latest` moves between two parts of a download: the second request gets the whole file."""
    put_text(client, "voice", "hello", {})
    tag = client.get(CONTENT, headers={"Range": "bytes=0-3"}).headers["etag"]
    put_text(client, "voice", "HELLO", {})
    rest = client.get(CONTENT, headers={"Range": "bytes=4-", "If-Range": tag})
    assert (rest.status_code, rest.content) == (200, client.get(CONTENT).content)
    assert client.get(CONTENT, headers={"Range": "bytes=4-", "If-Match": tag}).status_code == 412
