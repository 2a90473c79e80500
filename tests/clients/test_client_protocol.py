"""Requests as plain data and answers as types, without a socket."""

import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixd.client import errors, protocol
from prefixd.client.streams import ChunkReader
from prefixd.client.types import Choice, CompletionChunk, Model, PrefixUsed, Usage
from prefixd.client.wire import Request, Response, prefix_used
from tests.clients.samples import MANIFEST, TEXT_CHUNKS, TEXT_EVENTS, USED


def _answer(body: object, *, status: int = 200, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status=status, headers=named, body=json.dumps(body).encode())


# ── Requests ─────────────────────────────────────────────────────────────────────────────────


def test_an_upload_from_a_folder_names_files_and_reads_none():
    call = protocol.upload_folder("triage", Path("/nowhere"), metadata={"task_id": 1})
    assert (call.request.method, call.request.path) == ("PUT", "/v1/prefixes/triage")
    assert [(part.name, part.content) for part in call.request.parts] == [
        ("config", Path("/nowhere/adapter_config.json")),
        ("weights", Path("/nowhere/adapter_model.safetensors")),
        ("metadata", b'{"task_id":1}'),
    ]


def test_an_upload_of_text_is_json():
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
def test_a_name_stays_one_segment_of_the_path(name: str, path: str):
    assert protocol.show_prefix(name).request.path == path


def test_sampling_fields_travel_as_they_are():
    call = protocol.complete("Hi", model="triage@prod", max_tokens=4, temperature=0.0, user="alice")
    assert call.request.json == {
        "model": "triage@prod",
        "prompt": "Hi",
        "max_tokens": 4,
        "temperature": 0.0,
        "user": "alice",
    }


def test_what_a_request_asks_of_the_queue_travels_too():
    call = protocol.chat([], model="base", priority=-1, timeout=2.5, kv_reuse=False)
    assert call.request.json is not None
    assert call.request.json["priority"] == -1
    assert call.request.json["timeout"] == 2.5
    assert call.request.json["kv_reuse"] is False


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


def test_an_upload_may_ask_to_be_warmed():
    for call in (
        protocol.upload_text("voice", "x", warm=True),
        protocol.upload_folder("voice", Path("/nowhere"), warm=True),
    ):
        assert dict(call.request.params) == {"warm": "true"}
    assert dict(protocol.upload_text("voice", "x").request.params) == {}


def test_a_stream_asks_for_its_usage():
    sent = protocol.stream_chat([{"role": "user", "content": "Hi"}], model="base").request.json
    assert sent is not None
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True}


# ── Answers ──────────────────────────────────────────────────────────────────────────────────


def test_a_manifest_is_typed():
    prefix = protocol.show_prefix("triage").parse(_answer(MANIFEST))
    assert prefix.reference == "triage@3"
    assert prefix.created_at == datetime(2026, 11, 21, 10, tzinfo=UTC)
    assert prefix.aliases == ("latest", "prod")
    assert prefix.metadata == {"task_id": 1}


def test_a_manifest_says_where_it_is():
    plain = protocol.show_prefix("triage").parse(_answer(MANIFEST))
    assert (plain.pinned, plain.tier) == (False, None)
    kept = protocol.pin("triage").parse(_answer({**MANIFEST, "pinned": True, "tier": "resident"}))
    assert (kept.pinned, kept.tier) == (True, "resident")


@pytest.mark.parametrize(("status", "state"), [(200, "resident"), (202, "fetching")])
def test_warming_says_how_far_it_is(status: int, state: str):
    body = {"object": "prefix.residency", **USED, "state": state}
    found = protocol.warm("triage").parse(_answer(body, status=status))
    assert (found.reference, found.digest, found.state) == ("triage@3", "ab" * 32, state)


def test_usage_says_what_was_shared():
    body = {
        "prompt_tokens": 9,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert Usage.model_validate(body) == Usage(
        prompt_tokens=9, completion_tokens=1, cached_tokens=8
    )
    assert Usage.model_validate({**body, "prompt_tokens_details": None}) == Usage(
        prompt_tokens=9, completion_tokens=1
    )


@pytest.mark.parametrize(("status", "created"), [(201, True), (200, False)])
def test_an_upload_says_whether_it_made_a_version(status: int, created: bool):
    call = protocol.upload_text("triage", "x")
    assert call.parse(_answer(MANIFEST, status=status)).created is created


@pytest.mark.parametrize(
    "broken", [{"version": "3"}, {"version": True}, {"version": None}, {"created_at": "today"}]
)
def test_a_field_of_the_wrong_type_is_named(broken: dict[str, object]):
    with pytest.raises(errors.ProtocolError, match=next(iter(broken))):
        protocol.show_prefix("triage").parse(_answer(MANIFEST | broken))


def test_a_completion_reports_its_prefix():
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
    done = protocol.complete("x", model="triage").parse(_answer(body, x_request_id="r1"))
    assert done.text == "a"
    assert done.choices[1] == Choice(index=1, text="b", finish_reason="length")
    assert done.usage == Usage(prompt_tokens=2, completion_tokens=2)
    assert done.prefix == PrefixUsed(name="triage", version=3, digest="ab" * 32)
    assert done.prefix.reference == "triage@3"
    assert done.request_id == "r1"


def test_a_chat_answer_under_the_bare_base():
    message = {"role": "assistant", "content": "Paris."}
    body = {
        "id": "c",
        "model": "base",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "prefix": None,
    }
    done = protocol.chat([], model="base").parse(_answer(body))
    assert (done.text, done.prefix, done.usage) == ("Paris.", None, None)


def test_models_know_their_base():
    body = {"data": [{"id": "base", "parent": None}, {"id": "triage", "parent": "base"}]}
    models = protocol.list_models().parse(_answer(body))
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
def test_the_headers_name_the_prefix_of_a_stream(
    headers: dict[str, str], expected: PrefixUsed | None
):
    assert prefix_used(headers) == expected


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────


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
    ],
)
def test_every_status_has_its_error(status: int, kind: type[errors.ApiError]):
    error = {"message": "no", "type": "t", "code": "c", "param": "p", "request_id": "r"}
    with pytest.raises(kind) as caught:
        protocol.delete_prefix("x").parse(_answer({"error": error}, status=status, retry_after="2"))
    found = caught.value
    assert type(found) is kind
    assert (found.status, str(found), found.type, found.code) == (status, "no", "t", "c")
    assert (found.param, found.request_id, found.retry_after) == ("p", "r", 2.0)


@pytest.mark.parametrize("body", [b"<html>Bad gateway", b"[]", b'{"error":"no"}', b"\xff"])
def test_a_strangers_error_page_keeps_its_status(body: bytes):
    response = Response(502, {"x-request-id": "r9", "retry-after": "tomorrow"}, body)
    with pytest.raises(errors.ServerError, match="502") as caught:
        protocol.metrics().parse(response)
    assert (caught.value.request_id, caught.value.retry_after) == ("r9", None)


def test_a_page_that_is_no_json_is_a_protocol_error():
    with pytest.raises(errors.ProtocolError, match="expected JSON"):
        protocol.list_models().parse(Response(200, {}, b"<html>hello"))


def test_a_redirect_is_no_answer():
    with pytest.raises(errors.ProtocolError, match="redirects"):
        protocol.delete_prefix("x").parse(Response(302, {}, b""))


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_readiness_is_an_answer_and_no_error(status: int, ready: bool):
    assert protocol.is_ready().parse(_answer({}, status=status)) is ready


# ── Streams ──────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, len(TEXT_EVENTS))))
def test_a_stream_reads_alike_however_it_is_cut(cuts: list[int]):
    reader = ChunkReader()
    edges = [0, *sorted(cuts), len(TEXT_EVENTS)]
    chunks = [
        chunk
        for start, end in itertools.pairwise(edges)
        for chunk in reader.feed(TEXT_EVENTS[start:end])
    ]
    reader.finish()
    assert chunks == TEXT_CHUNKS


@given(st.lists(st.integers(0, 10_000)))
def test_what_came_before_a_failure_is_read_however_it_is_cut(cuts: list[int]):
    text = b'data: {"choices":[{"index":0,"text":"so far"}]}\n\n'
    events = text + b'data: {"error":{"message":"the row failed"}}\n\n'
    reader = ChunkReader()
    edges = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    pieces = (events[start:end] for start, end in itertools.pairwise(edges))
    chunks = itertools.chain.from_iterable(map(reader.feed, pieces))
    assert next(chunks) == CompletionChunk(text="so far", index=0)
    with pytest.raises(errors.ServerError, match="the row failed"):
        next(chunks)


def test_a_chat_stream_skips_what_has_no_text():
    reader = ChunkReader()
    events = (
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
        b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
    )
    assert list(reader.feed(events)) == [
        CompletionChunk(text="", index=0),
        CompletionChunk(text="Hi", index=0),
    ]


def test_a_stream_without_its_last_event_was_interrupted():
    reader = ChunkReader()
    assert list(reader.feed(b'data: {"choices":[]}\n\n')) == []
    with pytest.raises(errors.StreamInterruptedError):
        reader.finish()


def test_a_failure_in_mid_stream_is_the_servers():
    reader = ChunkReader()
    with pytest.raises(errors.ServerError, match="the row failed") as caught:
        list(reader.feed(b'data: {"error":{"message":"the row failed","request_id":"r2"}}\n\n'))
    assert caught.value.request_id == "r2"


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("shutting_down", errors.UnavailableError, 503),
        ("overloaded", errors.UnavailableError, 503),
        ("deadline_exceeded", errors.DeadlineError, 504),
        ("engine_error", errors.ServerError, 500),
        (None, errors.ServerError, 500),
    ],
)
def test_the_last_event_of_a_stream_may_be_a_refusal(
    code: str | None, kind: type[errors.ApiError], status: int
):
    event = json.dumps({"error": {"message": "the server is shutting down", "code": code}})
    reader = ChunkReader()
    assert list(reader.feed(b'data: {"choices":[{"index":0,"text":"so far"}]}\n\n'))
    with pytest.raises(kind, match=r"^the server is shutting down$") as caught:
        list(reader.feed(f"data: {event}\n\ndata: [DONE]\n\n".encode()))
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code) == (status, code)


def test_an_event_that_is_no_chunk_is_a_protocol_error():
    with pytest.raises(errors.ProtocolError, match="choices"):
        list(ChunkReader().feed(b'data: {"hello":1}\n\n'))
