"""Ensembles over HTTP: one answer from the predictions, or the answers, of several prefixes."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server import testing
from prefixd.server.testing import fake_ensemble, fake_next_token
from tests.api.api_world import World, error_of
from tests.api.composed import PROMPT, acting, complete, put_kv, put_soft, put_text, text_of

MEMBERS = ["alice", "bob", "kv"]
MEAN = {"ensemble": MEMBERS}
VOTE = {"ensemble": MEMBERS, "combine": "vote"}


@pytest.fixture
def digests(client: TestClient) -> list[str]:
    """Those of two soft prompts and a KV prefix."""
    manifests = [
        put_soft(client, "alice"),
        put_soft(client, "bob", fill=0.75),
        put_kv(client, "kv"),
    ]
    return [manifest["digest"] for manifest in manifests]


@pytest.fixture
def few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake model has two letters, so that members agree now and then."""
    monkeypatch.setattr(testing, "fake_next_token", lambda *seen: 97 + fake_next_token(*seen) % 2)


def mean_text(digests: list[str], prompt: str = PROMPT, count: int = 6) -> str:
    rows = [(digest, list(prompt.encode())) for digest in digests]
    return bytes(fake_ensemble(rows, count)).decode()


# -- mean_logprob ----


def test_one_token_is_chosen_from_the_predictions_of_all_members(
    client: TestClient, world: World, digests: list[str]
) -> None:
    answer = complete(client, MEAN)
    assert text_of(answer) == mean_text(digests)
    used = answer.json()["prefix"]
    assert (used["kind"], used["combine"], used["version"]) == ("ensemble", "mean_logprob", None)
    assert [member["reference"] for member in used["members"]] == ["alice@1", "bob@1", "kv@1"]
    rows = [
        {chunk.prefix.digest for chunk in step.chunks if chunk.prefix}
        for step in world.runner.steps[-5:]
    ]
    assert rows == [set(digests)] * 5, "members are rows of the same passes"


def test_an_ensemble_is_charged_as_its_rows(client: TestClient, digests: list[str]) -> None:
    assert digests
    prompt, count = 3 * len(PROMPT), 3 * 6
    for composed in (MEAN, VOTE):
        usage = complete(client, composed, kv_reuse=False).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, count)


def test_the_counts_so_far_in_a_stream_are_of_all_rows(
    client: TestClient, digests: list[str]
) -> None:
    assert digests
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "prefix": MEAN}
    answer = client.post(
        "/v1/completions", json={**body, "stream": True, "stream_options": options}
    )
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line[6:7] == "{"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [3, 6, 9, 12, 15, 18, 18]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3 * len(PROMPT)}


def test_streams_several_prompts_and_n_answers_of_an_ensemble(
    client: TestClient, digests: list[str]
) -> None:
    with client.stream(
        "POST",
        "/v1/completions",
        json={"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "stream": True, "prefix": MEAN},
    ) as stream:
        lines = [line for line in stream.iter_lines() if '"text"' in line]
    assert len(lines) == 6, "one event for each token of the answer, not of each member"
    answer = complete(client, MEAN, prompt=["one", "another"], n=2).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [mean_text(digests, text) for text in ("one", "one", "another", "another")]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_members_of_a_chat_have_the_recipe_of_the_ensemble(client: TestClient) -> None:
    """And not their own: what differs is the prefix."""
    own = {"prompt_template": "Q: {prompt} A:"}
    digests = [put_soft(client, name, own, fill=fill)["digest"] for name, fill in
               (("alice", 0.25), ("bob", 0.5))]  # fmt: skip
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 6,
        "prefix": {"ensemble": ["alice", "bob"]},
    }
    answer = client.post("/v1/chat/completions", json=body).json()
    content = answer["choices"][0]["message"]["content"]
    assert content == mean_text(digests, "Q: hello A:")
    put_soft(client, "bob", {"prompt_template": "T: {prompt}"}, fill=0.6)
    answer = client.post("/v1/chat/completions", json=body).json()
    assert "no recipe is applied" in answer["warnings"][0]


def test_a_text_is_a_member_with_its_tokens_in_front(client: TestClient) -> None:
    digests = [put_text(client, "brief", "Be brief. ")["digest"], put_soft(client, "a")["digest"]]
    assert text_of(complete(client, {"ensemble": ["brief", "a"]})) == mean_text(digests)


def test_logprobs_and_grammars_are_those_of_the_ensemble(
    client: TestClient, digests: list[str]
) -> None:
    assert digests
    choice = complete(client, MEAN, logprobs=2).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 6
    grammar = {"structured_outputs": {"regex": "[xy]{6}"}}
    text = text_of(complete(client, MEAN, **grammar))
    assert set(text) <= set("xy")
    assert len(text) == 6


# -- vote ----


def test_the_most_frequent_answer_wins(
    client: TestClient, digests: list[str], few_letters: None
) -> None:
    for prompt in map(str, range(12)):
        own = [bytes([97 + fake_next_token(d, prompt.encode()) % 2]).decode() for d in digests]
        expected = max(own, key=own.count)  # the first of those that are equally frequent
        assert text_of(complete(client, VOTE, prompt=prompt, max_tokens=1)) == expected


def test_a_tie_goes_to_the_first_member(client: TestClient, digests: list[str]) -> None:
    answers = {name: text_of(complete(client, model=name)) for name in MEMBERS}
    assert len(set(answers.values())) == 3, "no two members agree"
    assert text_of(complete(client, VOTE)) == answers["alice"]
    turned = {"ensemble": ["kv", "bob", "alice"], "combine": "vote"}
    assert text_of(complete(client, turned)) == answers["kv"]
    same = {"ensemble": ["alice", "bob", "bob"], "combine": "vote"}
    answer = complete(client, same, n=2, prompt=[PROMPT, "another"]).json()
    texts = [choice["text"] for choice in answer["choices"]]
    other = text_of(complete(client, model="bob", prompt="another"))
    assert texts == [answers["bob"]] * 2 + [other] * 2


# -- other shapes ----


@pytest.mark.parametrize("combine", ["mean_logprob", "vote"])
def test_responses_and_messages_are_answered_by_ensembles(
    client: TestClient, digests: list[str], combine: str
) -> None:
    assert digests
    prefix = {"ensemble": MEMBERS, "combine": combine}
    turns = [{"role": "user", "content": "hello"}]
    common = {"model": "tiny", "temperature": 0, "prefix": prefix}
    chat = client.post(
        "/v1/chat/completions", json={**common, "messages": turns, "max_tokens": 16}
    ).json()
    text = chat["choices"][0]["message"]["content"]
    body = {**common, "input": "hello", "max_output_tokens": 16}
    response = client.post("/v1/responses", json=body).json()
    assert response["output"][0]["content"][0]["text"] == text
    assert response["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    body = {**common, "messages": turns, "max_tokens": 16}
    message = client.post("/v1/messages", json=body).json()
    assert message["content"][0]["text"] == text
    for path, turn in (("responses", {"input": "hello"}), ("messages", {"messages": turns})):
        limit = {"max_tokens": 16} if path == "messages" else {}
        streamed = client.post(f"/v1/{path}", json={**common, **turn, **limit, "stream": True})
        assert streamed.status_code == (400 if combine == "vote" else 200), streamed.text


# -- agreement ----


@pytest.mark.parametrize("combine", ["mean_logprob", "vote"])
def test_a_saved_ensemble_shows_how_often_each_member_agreed(
    client: TestClient, world: World, digests: list[str], few_letters: None, combine: str
) -> None:
    saved = client.put("/v1/prefixes/mix", json={"ensemble": MEMBERS, "combine": combine})
    assert saved.status_code == 201
    shown = client.get("/v1/prefixes/mix").json()["members"]
    assert [member["agreement"] for member in shown] == [None] * 3
    texts = [text_of(complete(client, model="mix", prompt=str(i))) for i in range(8)]
    world.app.state.catalog.settlements.wait_until_idle(timeout_s=20)
    for path in ("mix", "mix/versions/1", "mix/aliases/latest"):
        shown = client.get(f"/v1/prefixes/{path}").json()["members"]
        agreement = [member["agreement"] for member in shown]
        assert [each["compared"] for each in agreement] == [48 if combine != "vote" else 8] * 3
    for digest, each in zip(digests, agreement, strict=True):
        assert each["agreed"] == sum(agreed(digest, i, text, combine) for i, text in
                                     enumerate(texts))  # fmt: skip
    assert client.delete("/v1/prefixes/mix").status_code == 204


def agreed(digest: str, number: int, text: str, combine: str) -> int:
    """Tokens, or whole answers, that the member alone would have given."""
    seen, own = list(str(number).encode()), []
    for token in text.encode():
        own.append(97 + fake_next_token(digest, seen) % 2)
        seen.append(token if combine == "mean_logprob" else own[-1])
    pairs = zip(own, text.encode(), strict=True)
    same = [mine == token for mine, token in pairs]
    return sum(same) if combine == "mean_logprob" else int(all(same))


# -- what is refused ----


@pytest.mark.parametrize(
    ("composed", "fields", "param", "message"),
    [
        (VOTE, {"stream": True}, "stream", "no stream of an ensemble with combine 'vote'"),
        (MEAN, {"max_tokens": 0}, "max_tokens", "at least one token of output"),
        (MEAN, {"echo": True}, "prefix", "one prefix of a request that shows its prompt"),
        (MEAN, {"prompt_logprobs": 1}, "prefix", "one prefix of a request that shows its prompt"),
        (MEAN, {"max_tokens": 100_000}, "max_tokens", "can never fit"),
        (MEAN, {"n": 100}, "n", "rows in one request"),
        (MEAN, {"model": "alice"}, "model", "expected the base"),
    ],
)
@pytest.mark.usefixtures("digests")
def test_what_an_ensemble_cannot_do_is_refused_by_name(
    client: TestClient, composed: dict[str, Any], fields: dict[str, Any], param: str, message: str
) -> None:
    answer = complete(client, composed, **fields)
    error = error_of(answer)
    assert answer.status_code == 400
    assert (error["param"], message in error["message"]) == (param, True), error


def test_members_that_do_not_fit_together_are_refused(
    client: TestClient, world: World, digests: list[str]
) -> None:
    assert digests
    world.tenants.set_quota("acme", {"max_resident_tokens": 12})  # they have 4 + 4 + 5
    answer = complete(client, MEAN)
    assert error_of(answer)["param"] == "max_resident_tokens"
    assert "needs 13 at the same time" in error_of(answer)["message"]
    assert text_of(complete(client, {"ensemble": ["alice", "bob"]}))


def test_a_member_of_another_tenant_is_as_one_that_does_not_exist(
    client: TestClient, world: World, digests: list[str]
) -> None:
    assert digests
    with acting(client, world, "beta"):
        put_soft(client, "own")
        for combine in ("mean_logprob", "vote"):
            errors = []
            for name in ("alice", "nowhere"):
                composed = {"ensemble": ["own", name], "combine": combine}
                answer = complete(client, composed)
                assert answer.status_code == 404
                error = error_of(answer)
                errors.append({**error, "message": error["message"].replace(name, "NAME"),
                               "request_id": None})  # fmt: skip
            assert errors[0] == errors[1]
