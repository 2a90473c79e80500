"""Requests as plain data and responses as models, without a socket."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest
from pydantic import ValidationError

from prefixd.client import Client, errors, folders, protocol, protocol_admin
from prefixd.client.types import Choice, Model, PrefixUsed, Usage
from prefixd.client.wire import Request, Response, parse_json, prefix_used
from tests.clients.samples import MANIFEST, USED


def _response(body: object, *, status: int = 200, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status=status, headers=named, body=json.dumps(body).encode())


# ── Requests ─────────────────────────────────────────────────────────────────────────────────


def test_folder_upload_names_its_files_without_opening_them():
    call = folders.upload_folder("triage", Path("/nowhere"), metadata={"task_id": 1})
    assert (call.request.method, call.request.path) == ("PUT", "/v1/prefixes/triage")
    assert [(part.name, part.content) for part in call.request.parts] == [
        ("config", Path("/nowhere/adapter_config.json")),
        ("weights", Path("/nowhere/adapter_model.safetensors")),
        ("metadata", b'{"task_id":1}'),
    ]


def test_text_upload_is_sent_as_json():
    call = protocol.upload_text("voice", "Answer like a pirate.")
    assert call.request.json == {"kind": "text", "text": "Answer like a pirate."}
    assert call.request.parts == ()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("triage@3", "/v1/prefixes/triage@3"),
        ("../admin", "/v1/prefixes/..%2Fadmin"),
        ("a?b#c", "/v1/prefixes/a%3Fb%23c"),
    ],
)
def test_prefix_name_is_quoted_into_one_path_segment(name: str, path: str):
    assert protocol.show_prefix(name).request.path == path


@pytest.mark.parametrize(
    "send",
    [
        lambda client: client.complete("a\ud83d", model="m"),
        lambda client: client.show_prefix("a\ud83d"),
        lambda client: client.list_prefixes(after="a\ud83d"),
        lambda client: client.upload_text("a", "hi", metadata={"description": "a\ud83d"}),
        lambda client: client.pin("a", if_match="a\ud83d"),
        lambda _: Client("a\ud83d"),
    ],
)
def test_text_that_cannot_be_encoded_is_one_error_and_nothing_is_sent(
    send: Callable[[Client], object],
) -> None:
    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise AssertionError("nothing is sent")

    with (
        Client(transport=httpx2.MockTransport(refuse)) as client,
        pytest.raises(errors.FormatError, match=r"expected text that (utf-8|ascii) encodes.*ud83d"),
    ):
        send(client)


def test_sampling_fields_are_sent_unchanged():
    call = protocol.complete("Hi", model="triage@prod", max_tokens=4, temperature=0.0, user="alice")
    assert call.request.json == {
        "model": "triage@prod",
        "prompt": "Hi",
        "max_tokens": 4,
        "temperature": 0.0,
        "user": "alice",
    }


def test_priority_timeout_and_switches_are_sent():
    call = protocol.chat(
        [], model="base", priority=-1, timeout=2.5, kv_reuse=False, speculate=False
    )
    assert call.request.json is not None
    assert call.request.json["priority"] == -1
    assert call.request.json["timeout"] == 2.5
    assert call.request.json["kv_reuse"] is False
    assert call.request.json["speculate"] is False


@pytest.mark.parametrize(
    ("request_", "sent"),
    [
        (protocol.warm("triage@prod").request, ("POST", "/v1/prefixes/triage@prod/warm")),
        (protocol.pin("triage@3").request, ("PUT", "/v1/prefixes/triage@3/pin")),
        (protocol.unpin("triage").request, ("DELETE", "/v1/prefixes/triage/pin")),
    ],
)
def test_warm_pin_and_unpin_have_no_body(request_: Request, sent: tuple[str, str]):
    assert (request_.method, request_.path) == sent
    assert (request_.json, dict(request_.params)) == (None, {})


def test_upload_with_warm_sets_the_query_parameter():
    for call in (
        protocol.upload_text("voice", "x", warm=True),
        folders.upload_folder("voice", Path("/nowhere"), warm=True),
    ):
        assert dict(call.request.params) == {"warm": "true"}
    assert dict(protocol.upload_text("voice", "x").request.params) == {}


def test_stream_requests_usage():
    sent = protocol.stream_chat([{"role": "user", "content": "Hi"}], model="base").request.json
    assert sent is not None
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True}


# ── Responses ────────────────────────────────────────────────────────────────────────────────


def test_manifest_is_parsed_into_typed_fields():
    prefix = protocol.show_prefix("triage").parse(_response(MANIFEST))
    assert prefix.reference == "triage@3"
    assert prefix.created_at == datetime(2026, 11, 21, 10, tzinfo=UTC)
    assert prefix.aliases == ("latest", "prod")
    assert prefix.metadata == {"task_id": 1}


def test_manifest_has_pinned_and_tier():
    unpinned = protocol.show_prefix("triage").parse(_response(MANIFEST))
    assert (unpinned.pinned, unpinned.tier) == (False, None)
    pinned = protocol.pin("triage").parse(
        _response({**MANIFEST, "pinned": True, "tier": "resident"})
    )
    assert (pinned.pinned, pinned.tier) == (True, "resident")


@pytest.mark.parametrize(("status", "state"), [(200, "resident"), (202, "fetching")])
def test_warm_reports_the_residency_state(status: int, state: str):
    body = {"object": "prefix.residency", **USED, "state": state}
    warmed = protocol.warm("triage").parse(_response(body, status=status))
    assert (warmed.reference, warmed.digest, warmed.state) == ("triage@3", "ab" * 32, state)


def test_usage_has_the_cached_tokens():
    body = {
        "prompt_tokens": 9,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert parse_json(Usage, json.dumps(body)) == Usage(
        prompt_tokens=9, completion_tokens=1, cached_tokens=8
    )
    assert parse_json(Usage, json.dumps({**body, "prompt_tokens_details": None})) == Usage(
        prompt_tokens=9, completion_tokens=1
    )


@pytest.mark.parametrize(("status", "created"), [(201, True), (200, False)])
def test_upload_reports_whether_it_created_a_version(status: int, created: bool):
    call = protocol.upload_text("triage", "x")
    assert call.parse(_response(MANIFEST, status=status)).created is created


@pytest.mark.parametrize("warnings", [None, [], ["all layers"]])
def test_upload_reports_what_the_server_warns_of(warnings: list[str] | None):
    call = protocol.upload_text("voice", "Hello")
    uploaded = call.parse(_response(MANIFEST | {"warnings": warnings}, status=201))
    assert uploaded.warnings == tuple(warnings or ())


@pytest.mark.parametrize(
    "broken", [{"version": "3"}, {"version": True}, {"version": None}, {"created_at": "today"}]
)
def test_protocol_error_names_the_field_of_the_wrong_type(broken: dict[str, object]):
    with pytest.raises(errors.ProtocolError, match=next(iter(broken))):
        protocol.show_prefix("triage").parse(_response(MANIFEST | broken))


def test_protocol_error_names_a_nested_field_and_shows_its_value():
    body = {"data": [MANIFEST, MANIFEST | {"size_bytes": "big"}]}
    with pytest.raises(errors.ProtocolError) as caught:
        protocol.list_prefixes().parse(_response(body))
    assert str(caught.value) == (
        "the field 'data.1.size_bytes' should be a valid integer, the server sent 'big'"
    )


def test_protocol_error_for_a_missing_field_does_not_show_the_secret_of_a_key():
    body = {"key_id": "k1", "key": "pfx_secret", "tenant": "acme", "state": "active"}
    with pytest.raises(errors.ProtocolError) as caught:
        protocol_admin.create_key().parse(_response(body))
    assert str(caught.value) == "expected the field 'label', the server did not send it"


def test_time_without_an_offset_raises_protocol_error():
    body = MANIFEST | {"created_at": "2026-11-21T10:00:00"}
    with pytest.raises(errors.ProtocolError, match=r"created_at.*timezone"):
        protocol.show_prefix("triage").parse(_response(body))


def test_array_instead_of_an_object_raises_protocol_error():
    with pytest.raises(errors.ProtocolError, match=r"expected a JSON object, .* \[\]"):
        protocol.show_prefix("triage").parse(_response([]))


def test_null_means_the_default_of_a_field():
    body = MANIFEST | {"aliases": None, "metadata": None, "pinned": None, "tier": None}
    prefix = protocol.show_prefix("triage").parse(_response(body))
    assert (prefix.aliases, prefix.metadata, prefix.pinned, prefix.tier) == ((), {}, False, None)


def test_models_are_immutable():
    prefix = protocol.show_prefix("triage").parse(_response(MANIFEST))
    with pytest.raises(ValidationError, match="frozen"):
        prefix.version = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        ([], "choices"),
        ([{"index": 0}], "choices.0.text"),
        ([{"index": 0, "text": None}], "choices.0.text"),
        ([{"text": "a"}], "choices.0.index"),
        ([{"index": 0, "message": None}], "choices.0"),
        ([{"index": 0, "message": {"content": 5}}], "choices.0.content"),
    ],
)
def test_malformed_choices_raise_protocol_error(choices: list[object], field: str):
    body = {"id": "c", "model": "base", "choices": choices}
    with pytest.raises(errors.ProtocolError, match=f"'{field}'"):
        protocol.complete("x", model="base").parse(_response(body))


def test_completion_has_sorted_choices_usage_and_prefix():
    body = {
        "id": "cmpl-1",
        "model": "triage",
        "choices": [
            {"index": 1, "text": "b", "finish_reason": "length"},
            {"index": 0, "text": "a", "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
        "prefix": USED,
    }
    completion = protocol.complete("x", model="triage").parse(_response(body, x_request_id="r1"))
    assert completion.text == "a"
    assert completion.choices[1] == Choice(index=1, text="b", finish_reason="length")
    assert completion.usage == Usage(prompt_tokens=2, completion_tokens=2)
    assert completion.prefix == PrefixUsed(name="triage", version=3, digest="ab" * 32)
    assert completion.prefix.reference == "triage@3"
    assert completion.request_id == "r1"


def test_chat_response_of_the_base_has_no_prefix():
    message = {"role": "assistant", "content": "Paris."}
    body = {
        "id": "c",
        "model": "base",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "prefix": None,
    }
    completion = protocol.chat([], model="base").parse(_response(body))
    assert (completion.text, completion.prefix, completion.usage) == ("Paris.", None, None)


def test_models_have_their_base_as_parent():
    body = {"data": [{"id": "base", "parent": None}, {"id": "triage", "parent": "base"}]}
    models = protocol.list_models().parse(_response(body))
    assert models == (Model(id="base", parent=None), Model(id="triage", parent="base"))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        (
            {"x-prefixd-prefix": "a.b-c@12", "x-prefixd-prefix-digest": "ff"},
            PrefixUsed(name="a.b-c", version=12, digest="ff"),
        ),
    ],
)
def test_prefix_of_a_stream_is_read_from_its_headers(
    headers: dict[str, str], expected: PrefixUsed | None
):
    assert prefix_used(headers) == expected


# ── Error responses ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
        (409, errors.ConflictError),
        (413, errors.TooLargeError),
        (418, errors.ApiError),
        (422, errors.InvalidPrefixError),
        (429, errors.RateLimitError),
        (500, errors.ServerError),
        (502, errors.ServerError),
        (503, errors.UnavailableError),
        (504, errors.DeadlineError),
        (507, errors.StorageFullError),
    ],
)
def test_each_error_status_raises_its_class_with_all_fields(
    status: int, kind: type[errors.ApiError]
):
    details = {"message": "no", "type": "t", "code": "c", "param": "p", "request_id": "r"}
    with pytest.raises(kind) as caught:
        protocol.delete_prefix("x").parse(
            _response({"error": details}, status=status, retry_after="2")
        )
    error = caught.value
    assert type(error) is kind
    assert (error.status, str(error), error.type, error.code) == (status, "no", "t", "c")
    assert (error.param, error.request_id, error.retry_after) == ("p", "r", 2.0)


@pytest.mark.parametrize("body", [b"<html>Bad gateway", b"[]", b'{"error":"no"}', b"\xff"])
def test_error_page_of_a_proxy_raises_the_error_of_its_status(body: bytes):
    response = Response(502, {"x-request-id": "r9", "retry-after": "tomorrow"}, body)
    with pytest.raises(errors.ServerError, match="502") as caught:
        protocol.metrics().parse(response)
    assert (caught.value.request_id, caught.value.retry_after) == ("r9", None)


def test_response_that_is_not_json_raises_protocol_error():
    with pytest.raises(errors.ProtocolError, match="expected JSON"):
        protocol.list_models().parse(Response(200, {}, b"<html>hello"))


def test_redirect_raises_protocol_error():
    with pytest.raises(errors.ProtocolError, match="redirects"):
        protocol.delete_prefix("x").parse(Response(302, {}, b""))


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_status_503_of_the_readiness_check_returns_false(status: int, ready: bool):
    assert protocol.is_ready().parse(_response({}, status=status)) is ready
