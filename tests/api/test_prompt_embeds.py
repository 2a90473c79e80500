"""``prompt_embeds``: embeddings of a request in place of the tokens of a prompt."""

import base64
import hashlib
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.numpy import save

from prefixd.server.testing import FakeEmbeddings, fake_generate
from tests.api.api_world import BASE, MAX_POSITIONS, World, error_of, fake_text, put_text
from tests.api.test_completions import events
from tests.api.test_placed_prompts import put_soft

WIDTH = BASE.embedding_width


def rows(count: int, *, seed: int = 0, dtype: type = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(dtype)


def encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def embeds(tensor: np.ndarray[Any, Any], name: str = "prompt_embeds") -> str:
    return encoded(save({name: tensor}))


def text_after(sent: str, *, digest: str | None = None, count: int = 6) -> str:
    """What FakeRunner answers to these embeddings."""
    raw = base64.b64decode(sent)
    (entry,) = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]).values()
    name = b"embeds:" + hashlib.sha256(raw).digest()
    tokens = FakeEmbeddings(name, entry["shape"][-2]).rows()
    return bytes(fake_generate(digest, tokens, count)).decode()


def complete(client: TestClient, sent: object, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt_embeds": sent, "max_tokens": 6, **fields}
    return client.post("/v1/completions", json=body)


def texts(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


ONE, TWO = embeds(rows(5)), embeds(rows(3, seed=1))


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": []}])
def test_embeds_stand_in_place_of_a_prompt(client: TestClient, prompt: dict[str, Any]) -> None:
    answer = complete(client, ONE, **prompt)
    assert texts(answer) == [text_after(ONE)]
    assert answer.json()["usage"]["prompt_tokens"] == 5


def test_several_embeds_come_before_the_prompts(client: TestClient) -> None:
    answer = complete(client, [ONE, TWO], prompt=["hello", "bye"], n=2)
    expected = [text_after(ONE), text_after(TWO), fake_text(None, "hello", 6)]
    assert texts(answer) == [
        text for text in (*expected, fake_text(None, "bye", 6)) for _ in range(2)
    ]
    assert answer.json()["usage"]["prompt_tokens"] == 5 + 3 + 5 + 3
    assert texts(complete(client, [], prompt="hello")) == [fake_text(None, "hello", 6)]


def test_embeds_run_under_a_prefix(client: TestClient, world: World) -> None:
    manifest = put_text(client, "voice", "Be kind.", world.headers())
    answer = complete(client, ONE, model="voice")
    assert texts(answer) == [text_after(ONE, digest=manifest["digest"])]


def test_embeds_stand_where_the_template_has_the_prompt(client: TestClient) -> None:
    digest = put_soft(client, "tweet", "Tweet: {prompt}{prefix:0:8}!").json()["digest"]
    raw = base64.b64decode(ONE)
    given = FakeEmbeddings(b"embeds:" + hashlib.sha256(raw).digest(), 5).rows()
    inside = FakeEmbeddings(f"{digest}[0:8]".encode(), 8).rows()
    seen = [*b"Tweet: ", *given, *inside, *b"!"]
    answer = complete(client, ONE, model="tweet")
    assert texts(answer) == [bytes(fake_generate(None, seen, 6)).decode()]
    assert answer.json()["usage"]["prompt_tokens"] == 7 + 5 + 1


def test_streams_logprobs_and_token_ids_of_embeds(client: TestClient) -> None:
    chunks = events(complete(client, [ONE, TWO], stream=True, logprobs=1).text)
    for index, sent in enumerate([ONE, TWO]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == text_after(sent)
        assert sum(len(c["logprobs"]["tokens"]) for c in mine) == 6
    choice = complete(client, ONE, return_token_ids=True).json()["choices"][0]
    assert choice["prompt_token_ids"] == []
    assert bytes(choice["token_ids"]).decode() == text_after(ONE)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("leading", [(), (1,)])
@pytest.mark.parametrize("name", ["prompt_embeds", "x", "../../etc/passwd"])
def test_any_name_and_a_batch_of_one_are_taken(
    client: TestClient, dtype: type, leading: tuple[int, ...], name: str
) -> None:
    tensor = rows(4, dtype=dtype).reshape(*leading, 4, WIDTH)
    sent = embeds(tensor, name)
    assert texts(complete(client, sent)) == [text_after(sent)]


def torch_save() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(2, WIDTH), buffer)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(2, WIDTH), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def one_value(value: float) -> np.ndarray[Any, Any]:
    tensor = rows(2)
    tensor[1, 3] = value
    return tensor


REFUSED = {
    "no base64": ("not base64!", "safetensors in base64"),
    "other characters": ("ab%d", "safetensors in base64"),
    "empty": ("", "safetensors"),
    "torch.save": (encoded(torch_save()), "safetensors.torch.save"),
    "a pickle": (encoded(pickled()), "safetensors.torch.save"),
    "a width": (embeds(np.zeros((2, WIDTH + 1), np.float32)), f"[tokens, {WIDTH}]"),
    "one dimension": (embeds(np.zeros(WIDTH, np.float32)), f"[tokens, {WIDTH}]"),
    "a batch of two": (embeds(np.zeros((2, 3, WIDTH), np.float32)), f"[tokens, {WIDTH}]"),
    "no rows": (embeds(np.zeros((0, WIDTH), np.float32)), f"[tokens, {WIDTH}]"),
    "float64": (embeds(np.zeros((2, WIDTH))), "BF16, F16, F32"),
    "integers": (embeds(np.zeros((2, WIDTH), np.int32)), "BF16, F16, F32"),
    "NaN": (embeds(one_value(float("nan"))), "[1, 3]"),
    "infinity": (embeds(one_value(float("inf"))), "[1, 3]"),
    "a large value": (embeds(one_value(1e6)), "row 1, column 3"),
    "two tensors": (encoded(save({"a": rows(2), "b": rows(2)})), "expected one tensor, got 2"),
    "no tensor": (encoded(save({})), "expected one tensor, got 0"),
    "cut off": (encoded(save({"a": rows(2)})[:-4]), "bytes of tensors"),
    "bytes behind": (encoded(save({"a": rows(2)}) + b"\0"), "bytes of tensors"),
    "a long header": (encoded(b"\xff" * 7 + b"\0{}"), "header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_bytes_are_a_bad_request(client: TestClient, case: str) -> None:
    sent, words = REFUSED[case]
    answer = complete(client, [ONE, sent])
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("invalid_prompt_embeds", "prompt_embeds[1]")
    assert words in error["message"]
    assert error_of(complete(client, sent))["param"] == "prompt_embeds"


def test_more_rows_than_fit_are_refused(client: TestClient) -> None:
    error = error_of(complete(client, embeds(rows(MAX_POSITIONS))))
    assert error["code"] == "context_length_exceeded"
    error = error_of(complete(client, embeds(rows(MAX_POSITIONS + 1))))
    assert (error["code"], error["param"]) == ("invalid_prompt_embeds", "prompt_embeds")


@pytest.mark.parametrize(
    "fields",
    [{}, {"prompt": None}, {"prompt": []}, {"prompt_embeds": []}, {"prompt_embeds": None}],
)
def test_a_request_without_any_prompt_names_both_fields(
    client: TestClient, fields: dict[str, Any]
) -> None:
    answer = client.post("/v1/completions", json={"model": "tiny", **fields})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == "prompt"
    assert "'prompt'" in error["message"]
    assert "'prompt_embeds'" in error["message"]


@pytest.mark.parametrize("sent", [5, [5], {"a": 1}, [[ONE]]])
def test_other_types_are_named(client: TestClient, sent: object) -> None:
    error = error_of(complete(client, sent))
    assert (error["code"], error["param"]) == ("invalid_request", "prompt_embeds")
    assert "base64" in error["message"]


def test_kv_is_shared_for_equal_bytes_of_one_tenant_alone(client: TestClient, world: World) -> None:
    long = rows(40)
    same, other = embeds(long), embeds(np.vstack([long[:-1], rows(1, seed=9)]))

    def reused(sent: str, **options: Any) -> int:
        before = world.engine.stats().kv_reused_tokens
        body = {"model": "tiny", "prompt_embeds": sent, "max_tokens": 2}
        assert client.post("/v1/completions", json=body, **options).status_code == 200
        return world.engine.stats().kv_reused_tokens - before

    assert reused(same) == 0
    assert reused(same) == 32
    assert reused(other) == 0
    assert reused(same, headers=world.headers("beta")) == 0


def test_embeds_are_charged_as_tokens(client: TestClient, world: World) -> None:
    world.tenants.set_quota("acme", {"tokens_per_minute": 100})
    assert complete(client, embeds(rows(60))).status_code == 200
    assert complete(client, embeds(rows(60))).status_code == 429


def test_embeds_of_one_tenant_in_progress_are_bounded(client: TestClient, world: World) -> None:
    held = world.app.state.bounds.embeddings
    held.capacity = len(ONE) + 10
    held._wait_s = 0.0
    assert complete(client, ONE).status_code == 200
    held._held["acme"] = 20
    answer = complete(client, ONE)
    assert answer.status_code == 429
    assert error_of(answer)["code"] == "concurrency_limit_exceeded"
    held._held.clear()
    assert complete(client, ONE).status_code == 200
