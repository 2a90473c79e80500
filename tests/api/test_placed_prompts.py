"""Virtual tokens inside prompts: placed by the version's template, or by parts of a message."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.prefix_source import PrefixUnavailable
from prefixd.server.engine.request import PrefixKey
from prefixd.server.testing import FakeEmbeddings, fake_generate
from tests.api.api_world import MAX_POSITIONS, World, error_of
from tests.api.test_prefix_routes import CONFIG, files, weights

ROWS = 8
TEMPLATE = "{prefix:0:2}Tweet: {prompt}{prefix:4:8} Label:"
"""Virtual tokens 2 and 3 are not named: they stand in front, before 0 and 1."""

Seen = list[str | tuple[int, int]]
"""Text, and ranges of virtual tokens."""


def put_soft(client: TestClient, name: str, template: str | None = None, **options: Any) -> Any:
    parts = files(
        config=("c", json.dumps({**CONFIG, "num_virtual_tokens": ROWS}).encode()),
        weights=("w", weights(rows=ROWS)),
    )
    if template is not None:
        parts["metadata"] = ("m", json.dumps({"prompt_template": template}).encode())
    return client.put(f"/v1/prefixes/{name}", files=parts, **options)


def expected(digest: str, seen: Seen, *, front: str | None, count: int = 6) -> str:
    """What FakeRunner answers to a prompt behind virtual tokens ``front`` of a version."""
    tokens: list[int] = []
    for piece in seen:
        if isinstance(piece, str):
            tokens += piece.encode()
        else:
            start, stop = piece
            tokens += FakeEmbeddings(f"{digest}[{start}:{stop}]".encode(), stop - start).rows()
    under = None if front is None else digest + front
    return bytes(fake_generate(under, tokens, count)).decode()


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tweet", "prompt": "I like it", "max_tokens": 6, **fields}
    return client.post("/v1/completions", json=body)


def chat(client: TestClient, content: object, **fields: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    body = {"model": "tweet", "messages": messages, "max_tokens": 6, **fields}
    return client.post("/v1/chat/completions", json=body)


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def part(start: int, stop: int) -> dict[str, Any]:
    return {"type": "prefix", "from": start, "to": stop}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.fixture
def digest(client: TestClient) -> str:
    """Of the version ``tweet``, which TEMPLATE places."""
    answer = put_soft(client, "tweet", TEMPLATE)
    assert answer.status_code == 201, answer.text
    stored: str = answer.json()["digest"]
    return stored


@pytest.fixture
def plain(client: TestClient) -> str:
    """Of the version ``tweet``, without a template."""
    stored: str = put_soft(client, "tweet").json()["digest"]
    return stored


# -- templates ----


def test_a_template_places_virtual_tokens_in_front_and_inside(
    client: TestClient, digest: str
) -> None:
    seen: Seen = ["Tweet: I like it", (4, 8), " Label:"]
    answer = complete(client)
    assert text_of(answer) == expected(digest, seen, front="[2:4,0:2]")
    assert answer.json()["prefix"]["digest"] == digest
    assert answer.json()["usage"]["prompt_tokens"] == len("Tweet: I like it Label:")
    again = complete(client)
    assert text_of(again) == text_of(answer)
    cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached <= len("Tweet: I like it Label:")


def test_each_of_several_prompts_is_placed(client: TestClient, digest: str) -> None:
    choices = complete(client, prompt=["a", "b"], n=2).json()["choices"]
    seen: list[Seen] = [[f"Tweet: {each}", (4, 8), " Label:"] for each in "ab"]
    texts = [expected(digest, each, front="[2:4,0:2]") for each in seen]
    assert [choice["text"] for choice in choices] == [texts[0], texts[0], texts[1], texts[1]]


def test_token_ids_are_inserted_unchanged(client: TestClient, digest: str) -> None:
    answer = complete(client, prompt=list(b"I like it"))
    seen: Seen = ["Tweet: I like it", (4, 8), " Label:"]
    assert text_of(answer) == expected(digest, seen, front="[2:4,0:2]")
    refused = complete(client, prompt=[1, -2])
    assert refused.status_code == 400
    assert "-2" in error_of(refused)["message"]


@pytest.mark.parametrize(
    "words",
    ["{prefix:0:4}", "{prompt}", "{{prefix:4:8}", "{0} {} %s {x!r:>9}", "PREFIX0N0N", "\\1"],
)
def test_what_looks_like_a_marker_in_a_prompt_is_text(
    client: TestClient, digest: str, words: str
) -> None:
    seen: Seen = [f"Tweet: {words}", (4, 8), " Label:"]
    assert text_of(complete(client, prompt=words)) == expected(digest, seen, front="[2:4,0:2]")
    rendered = f"Tweet: user: {words}\nassistant: "
    assert text_of(chat(client, words)) == expected(
        digest, [rendered, (4, 8), " Label:"], front="[2:4,0:2]"
    )


def test_the_rendered_conversation_is_the_prompt_of_a_chat(client: TestClient, digest: str) -> None:
    seen: Seen = ["Tweet: user: hi\nassistant: ", (4, 8), " Label:"]
    assert text_of(chat(client, "hi")) == expected(digest, seen, front="[2:4,0:2]")


def test_a_template_without_markers_is_kept_and_not_applied(client: TestClient) -> None:
    stored = put_soft(client, "tweet", "Tweet: {prompt} Label:").json()
    assert stored["prompt_template"] == "Tweet: {prompt} Label:"
    assert text_of(complete(client)) == expected(stored["digest"], ["I like it"], front="")


def test_all_in_front_is_the_whole_prefix(client: TestClient, world: World) -> None:
    digest = put_soft(client, "tweet", "{prefix:0:3}{prefix:3:8}{prompt}").json()["digest"]
    assert text_of(complete(client)) == expected(digest, ["I like it"], front="")
    assert world.engine.held_prefixes() == {PrefixKey("acme", digest)}


def test_a_changed_template_holds_from_the_next_request_on(client: TestClient, digest: str) -> None:
    url = "/v1/prefixes/tweet/versions/1"
    assert client.patch(url, json={"prompt_template": "{prompt}{prefix:0:8}"}).status_code == 200
    assert text_of(complete(client)) == expected(digest, ["I like it", (0, 8)], front=None)
    assert client.patch(url, json={"prompt_template": None}).status_code == 200
    assert text_of(complete(client)) == expected(digest, ["I like it"], front="")


def test_a_template_that_does_not_fit_is_refused_at_upload_and_patch(
    client: TestClient, digest: str
) -> None:
    bad = "{prompt}{prefix:4:9}"
    for answer in (
        put_soft(client, "other", bad),
        put_soft(client, "tweet", bad),
        client.patch("/v1/prefixes/tweet/versions/1", json={"prompt_template": bad}),
        client.put(
            "/v1/prefixes/words",
            json={
                "kind": "text",
                "text": "x",
                "metadata": {"prompt_template": "{prefix:0:1}{prompt}"},
            },
        ),
    ):
        assert answer.status_code == 422, answer.text
        error = error_of(answer)
        assert error["code"] == "malformed_template"
        assert error["param"] == "metadata.prompt_template"
    shown = client.get("/v1/prefixes/tweet").json()
    assert (shown["prompt_template"], shown["digest"]) == (TEMPLATE, digest)


def test_positions_inside_count_for_the_context_and_the_limits(
    client: TestClient, world: World
) -> None:
    digest = put_soft(client, "tweet", "{prompt}{prefix:0:8}").json()["digest"]
    room = MAX_POSITIONS - ROWS - len("I like it")
    assert text_of(complete(client, max_tokens=room)) == expected(
        digest, ["I like it", (0, 8)], front=None, count=room
    )
    refused = complete(client, max_tokens=room + 1)
    assert error_of(refused)["code"] == "context_length_exceeded"
    assert error_of(refused)["message"] == (
        f"8 virtual tokens inside the prompt, 9 tokens of the prompt and {room + 1} tokens of "
        f"output can never fit: the model has {MAX_POSITIONS} positions"
    )
    world.tenants.set_quota("acme", {"tokens_per_minute": 40})
    answer = complete(client, max_tokens=1)
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert left == 40 - ROWS - len("I like it")
    assert answer.json()["usage"]["prompt_tokens"] == len("I like it")


def test_only_what_stands_in_front_counts_as_resident(client: TestClient, world: World) -> None:
    put_soft(client, "tweet", TEMPLATE)
    world.tenants.set_quota("acme", {"max_resident_tokens": 4})
    assert complete(client).status_code == 200
    world.tenants.set_quota("acme", {"max_resident_tokens": 3})
    assert error_of(complete(client))["code"] == "insufficient_quota"


def test_a_refusal_says_what_counts_as_what(client: TestClient, digest: str) -> None:
    refused = error_of(complete(client, max_tokens=MAX_POSITIONS))
    assert refused["message"] == (
        "4 virtual tokens in front of the prompt, 4 virtual tokens inside the prompt, 23 tokens of "
        f"the prompt and {MAX_POSITIONS} tokens of output can never fit: the model has "
        f"{MAX_POSITIONS} positions"
    )


def test_a_refusal_for_the_pool_says_what_it_holds(world: World) -> None:
    world.served = replace(world.served, max_positions=10**6)
    with TestClient(world.make_app(), headers=world.headers()) as client:
        put_soft(client, "tweet", TEMPLATE)
        refused = error_of(complete(client, max_tokens=MAX_POSITIONS * 2))
    assert refused["message"] == (
        "4 virtual tokens inside the prompt, 23 tokens of the prompt and 800 tokens of output can "
        "never fit: the KV pool has room for 493 tokens next to the prefix's 4 virtual tokens"
    )


def test_only_what_stands_in_front_counts_as_pinned(client: TestClient, world: World) -> None:
    put_soft(client, "tweet", TEMPLATE)
    put_soft(client, "whole", "{prefix:4:8}{prompt}")
    world.tenants.set_quota("acme", {"max_resident_tokens": 4})
    assert client.put("/v1/prefixes/tweet/pin").status_code == 200
    assert world.tenants.used("acme").used["max_resident_tokens"] == 4
    world.tenants.set_quota("acme", {"max_resident_tokens": ROWS})
    refused = error_of(client.put("/v1/prefixes/whole/pin"))
    assert "would have 12 pinned" in refused["message"]
    inside = {"prompt_template": "{prompt}{prefix:0:8}"}
    assert client.patch("/v1/prefixes/tweet/versions/1", json=inside).status_code == 200
    assert world.tenants.used("acme").used["max_resident_tokens"] == 0
    assert client.put("/v1/prefixes/whole/pin").status_code == 200


def test_warming_loads_what_stands_in_front(client: TestClient, world: World, digest: str) -> None:
    assert client.post("/v1/prefixes/tweet/warm").status_code == 202
    assert text_of(complete(client))
    warm = client.post("/v1/prefixes/tweet/warm")
    assert (warm.status_code, warm.json()["state"]) == (200, "resident")
    assert client.get("/v1/prefixes/tweet").json()["tier"] == "resident"
    assert world.engine.held_prefixes() == {PrefixKey("acme", digest, ((2, 4), (0, 2)))}
    client.patch("/v1/prefixes/tweet/versions/1", json={"prompt_template": "{prompt}{prefix:0:8}"})
    for refused in (client.post("/v1/prefixes/tweet/warm"), client.put("/v1/prefixes/tweet/pin")):
        assert refused.status_code == 409, refused.text
        assert error_of(refused)["code"] == "nothing_resident"


def test_an_upload_is_answered_by_where_its_virtual_tokens_stand(world: World) -> None:
    world.served = replace(world.served, prefix_warnings=lambda count: [f"{count} in front"])
    with TestClient(world.make_app(), headers=world.headers()) as client:
        for template, count in ((None, 8), ("{prefix:4:8}{prompt}", 8), (TEMPLATE, None)):
            answer = put_soft(client, "tweet", template)
            assert answer.json()["warnings"] == [f"{count} in front"]


# -- parts of a message ----


def test_parts_place_virtual_tokens_and_the_others_stand_in_front(
    client: TestClient, plain: str
) -> None:
    content = [text("a"), text("b"), part(2, 4), text(" c"), part(6, 8)]
    seen: Seen = ["user: a\nb", (2, 4), " c", (6, 8), "\nassistant: "]
    answer = chat(client, content)
    assert text_of(answer) == expected(plain, seen, front="[0:2,4:6]")
    assert answer.json()["usage"]["prompt_tokens"] == len("user: a\nb c\nassistant: ")


def test_parts_of_several_messages_and_all_of_the_prompt(client: TestClient, plain: str) -> None:
    messages = [
        {"role": "system", "content": [part(4, 8)]},
        {"role": "user", "content": [text("{prefix:0:4}"), part(0, 4)]},
    ]
    seen: Seen = ["system: ", (4, 8), "\nuser: {prefix:0:4}", (0, 4), "\nassistant: "]
    assert text_of(chat(client, "", messages=messages)) == expected(plain, seen, front=None)


def test_without_parts_all_stands_in_front(client: TestClient, plain: str) -> None:
    seen: Seen = ["user: a\nassistant: "]
    assert text_of(chat(client, [text("a")])) == expected(plain, seen, front="")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ([part(4, 9)], "misplaced_prefix", "4:9"),
        ([part(4, 4)], "misplaced_prefix", "4:4"),
        ([part(0, 4), part(3, 5)], "misplaced_prefix", "3 twice"),
        ([part(4, 0)], "misplaced_prefix", "4:0"),
        ([part(-1, 4)], "misplaced_prefix", "-1:4"),
        ([{"type": "prefix", "from": 0}], "invalid_request", "content[0].to' is required"),
        ([{"type": "prefix", "from": 0, "to": 4, "name": "x"}], "unknown_field", "[0].name'"),
        ([{"type": "prefix", "from": "0", "to": 4}], "invalid_request", "[0].from': expected"),
        ([{"type": "prefix", "start": 0, "stop": 4}], "invalid_request", "[0].from' is required"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    client: TestClient, plain: str, content: object, code: str, words: str
) -> None:
    answer = chat(client, content)
    assert answer.status_code == 400, answer.text
    assert (error_of(answer)["code"], words in error_of(answer)["message"]) == (code, True)


def test_the_part_that_is_wrong_is_named(client: TestClient, plain: str) -> None:
    answer = chat(client, [text("a"), part(0, 4), {"type": "image_url"}])
    assert error_of(answer)["param"] == "messages[0].content[2].image_url"
    assert error_of(chat(client, 5))["param"] == "messages[0].content"


def test_an_encoder_decoder_takes_no_template_that_moves_virtual_tokens(world: World) -> None:
    base = replace(world.served.base, encoder_layers=2)
    world.served = replace(world.served, base=base)
    config = {**CONFIG, "num_virtual_tokens": ROWS, "task_type": "SEQ_2_SEQ_LM"}
    changes: dict[str, Any] = {
        "config": ("c", json.dumps({**config, "num_transformer_submodules": 1}).encode()),
        "weights": ("w", weights(rows=ROWS)),
    }
    wrong, right = "{prefix:0:4}{prompt}", "{prefix:4:8}Q: {prompt}"
    with TestClient(world.make_app(), headers=world.headers()) as client:
        for template, status in ((wrong, 422), (right, 201)):
            metadata = ("m", json.dumps({"prompt_template": template}).encode())
            answer = client.put("/v1/prefixes/t", files=files(**changes, metadata=metadata))
            assert answer.status_code == status, answer.text
        patched = client.patch("/v1/prefixes/t/versions/1", json={"prompt_template": wrong})
        assert (patched.status_code, error_of(patched)["code"]) == (422, "malformed_template")
        assert client.get("/v1/prefixes/t").json()["prompt_template"] == right


def test_parts_need_a_soft_prompt_that_no_template_places(client: TestClient, digest: str) -> None:
    client.put("/v1/prefixes/words", json={"kind": "text", "text": "x" * 9})
    for model, words in (("tiny", "base model"), ("words", "hard_prompt"), ("tweet", "tweet@1")):
        answer = chat(client, [part(0, 1)], model=model)
        assert answer.status_code == 400, answer.text
        assert error_of(answer)["code"] == "misplaced_prefix"
        assert words in error_of(answer)["message"]


@pytest.mark.parametrize("template", ["{}", "{0}{0}", "x"])
def test_a_chat_template_that_changes_parts_is_refused(
    client: TestClient, world: World, plain: str, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    def render(_: object, messages: list[dict[str, str]], **_options: object) -> str:
        return template.format("".join(message["content"] for message in messages))

    monkeypatch.setattr(type(world.served.tokenizer), "render_chat", render)
    answer = chat(client, [text("a"), part(0, 8)])
    if template == "{}":
        assert text_of(answer) == expected(plain, ["a", (0, 8)], front=None)
        return
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "chat_template"


def test_parts_stream(client: TestClient, plain: str) -> None:
    answer = chat(client, [part(0, 8), text("a")], stream=True)
    chunks = [
        json.loads(frame.removeprefix("data: ")) for frame in answer.text.strip().split("\n\n")[:-1]
    ]
    streamed = "".join(
        choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]
    )
    assert streamed == expected(plain, ["user: ", (0, 8), "a\nassistant: "], front=None)


# -- loading ----


@pytest.fixture
def loads(client: TestClient) -> Iterator[list[PrefixKey]]:
    """What is loaded for the inside of prompts."""
    loader = client.app.state.generation.inputs  # type: ignore[attr-defined]
    load, keys = loader._load, list[PrefixKey]()

    def counted(key: PrefixKey) -> FakeEmbeddings:
        keys.append(key)
        embeddings: FakeEmbeddings = load(key)
        return embeddings

    loader._load = counted
    yield keys
    assert not loader._loading


def test_virtual_tokens_are_loaded_once_and_kept_within_a_bound(
    client: TestClient, world: World, plain: str, loads: list[PrefixKey]
) -> None:
    loader = client.app.state.generation.inputs  # type: ignore[attr-defined]
    loader._max_rows = 6
    for start, stop in ((0, 4), (0, 4), (4, 6), (0, 4), (2, 4), (4, 6)):
        assert text_of(chat(client, [text("a"), part(start, stop)]))
    rows = [key.rows for key in loads]
    assert rows == [((0, 4),), ((4, 6),), ((2, 4),), ((4, 6),)], "the least recently used leaves"
    assert loader._num_rows == sum(kept.num_rows for kept in loader._kept.values()) <= 6


def test_two_tenants_with_equal_bytes_share_nothing(
    client: TestClient, world: World, loads: list[PrefixKey]
) -> None:
    beta = world.headers("beta")
    put_soft(client, "tweet", "{prompt}{prefix:0:8}")
    put_soft(client, "tweet", "{prompt}{prefix:0:8}", headers=beta)
    body = {"model": "tweet", "prompt": "x" * 40, "max_tokens": 2}
    for headers in (world.headers(), beta):
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert [key.tenant for key in loads] == ["acme", "beta"]


@pytest.mark.parametrize(
    ("cause", "status"),
    [
        ("prefix_not_found", 404),
        ("corrupt_prefix", 500),
        ("prefix_refused", 422),
        ("storage_unavailable", 503),
        ("storage_full", 507),
        (None, 500),
        (ValueError("a secret"), 500),
    ],
)
def test_virtual_tokens_that_fail_to_load_are_answered_as_a_prefix_is(
    client: TestClient, plain: str, cause: str | Exception | None, status: int
) -> None:
    def load(_key: PrefixKey) -> FakeEmbeddings:
        if isinstance(cause, Exception):
            raise cause
        raise PrefixUnavailable("it failed", code=cause)

    loader = client.app.state.generation.inputs  # type: ignore[attr-defined]
    loader._load = load
    answer = chat(client, [part(0, 8), text("a")])
    code = cause if isinstance(cause, str) else "engine_error"
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert "secret" not in answer.text


def test_a_deleted_version_is_not_found(client: TestClient, digest: str) -> None:
    assert text_of(complete(client))
    client.delete("/v1/prefixes/tweet")
    assert complete(client).status_code == 404


def test_threads_that_load_rows_end_with_the_server(world: World) -> None:
    def loading() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("prefixd-inputs")]

    others = set(loading())
    with TestClient(world.make_app(), headers=world.headers()) as client:
        put_soft(client, "tweet", TEMPLATE)
        assert complete(client).status_code == 200
        started = [thread for thread in loading() if thread not in others]
    assert started
    for thread in started:
        thread.join(30)
    assert not any(thread.is_alive() for thread in started)
