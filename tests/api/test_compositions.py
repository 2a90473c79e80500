"""Stacks, blends and ensembles that a request names in its field ``prefix``."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefixd.server.api.generate.compositions import ComposedPrefix
from prefixd.store.artifact.composition import Combine
from prefixd.store.artifact.kinds import Kind
from tests.api.api_world import World, error_of
from tests.api.composed import (
    PROMPT,
    acting,
    answer_under,
    complete,
    put_kv,
    put_soft,
    put_text,
    text_of,
)

HIDDEN = "secret of the other tenant"


@pytest.fixture
def parts(client: TestClient) -> dict[str, str]:
    """Digests by name: two texts, two soft prompts of one length, and a KV prefix."""
    return {
        "company": put_text(client, "company", "Be kind. ")["digest"],
        "team": put_text(client, "team", "Be brief.")["digest"],
        "alice": put_soft(client, "alice", fill=0.25)["digest"],
        "bob": put_soft(client, "bob", fill=0.75)["digest"],
        "kv": put_kv(client, "kv")["digest"],
    }


def resident(world: World) -> list[tuple[str, int]]:
    """Digest and virtual tokens of what is in the pool."""
    entries = world.engine.state()["prefixes"]["entries"]
    return [(entry["digest"], entry["tokens"]) for entry in entries]


# -- what is computed ----


@pytest.mark.parametrize(
    ("stack", "num_tokens"),
    [
        (["company", "alice"], 9 + 4),
        (["alice", "company"], 4 + 9),
        (["company", "team", "alice"], 9 + 9 + 4),
        (["kv", "company", "alice", "team", "bob"], 5 + 9 + 4 + 9 + 4),
        (["alice", "alice"], 8),
        (["kv"], 5),
    ],
)
def test_a_stack_is_one_prefix_of_its_members_in_order(
    client: TestClient,
    world: World,
    parts: dict[str, str],
    stack: list[str],
    num_tokens: int,
) -> None:
    answer = complete(client, {"stack": stack})
    digests = [parts[name] for name in stack]
    assert text_of(answer) == answer_under(Kind.STACK, digests)
    used = answer.json()["prefix"]
    assert (used["name"], used["version"], used["chosen_by"]) == (None, None, "prefix")
    assert used["kind"] == "stack"
    assert used["members"] == [{"reference": f"{name}@1", "digest": parts[name]} for name in stack]
    assert answer.headers["x-prefixd-prefix"] == ",".join(f"{name}@1" for name in stack)
    assert answer.headers["x-prefixd-prefix-digest"] == used["digest"]
    assert resident(world) == [(used["digest"], num_tokens)]


def test_the_order_of_a_stack_counts_and_that_of_a_blend_does_not(
    client: TestClient, parts: dict[str, str], world: World
) -> None:
    one, other = (
        complete(client, {"stack": names}) for names in (["alice", "bob"], ["bob", "alice"])
    )
    assert one.json()["prefix"]["digest"] != other.json()["prefix"]["digest"]
    blends = [
        complete(client, {"blend": weights}).json()["prefix"]
        for weights in ({"alice": 0.25, "bob": 0.75}, {"bob@1": 0.75, "alice@latest": 0.25})
    ]
    assert blends[0]["digest"] == blends[1]["digest"]
    assert [member["weight"] for member in blends[0]["members"]] == [0.25, 0.75]
    assert len(resident(world)) == 3


def test_a_blend_takes_the_positions_of_one_member(
    client: TestClient, parts: dict[str, str], world: World
) -> None:
    answer = complete(client, {"blend": {"bob": 0.75, "alice": 0.25}})
    pairs = sorted([(parts["alice"], 0.25), (parts["bob"], 0.75)])
    digests, weights = zip(*pairs, strict=True)
    assert text_of(answer) == answer_under(Kind.BLEND, digests, weights)
    assert resident(world) == [(answer.json()["prefix"]["digest"], 4)]


def test_a_member_that_is_uploaded_again_is_another_prefix(
    client: TestClient, parts: dict[str, str]
) -> None:
    stack = {"stack": ["company", "alice"]}
    before = complete(client, stack)
    assert complete(client, stack).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    new = put_soft(client, "alice", fill=0.3)["digest"]
    after = complete(client, stack)
    assert text_of(after) == answer_under(Kind.STACK, [parts["company"], new])
    assert after.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert after.json()["prefix"]["digest"] != before.json()["prefix"]["digest"]


def test_kv_is_reused_under_one_composition_and_under_no_other(
    client: TestClient, parts: dict[str, str]
) -> None:
    prompt = PROMPT * 8

    def cached(prefix: object) -> int:
        answer = complete(client, prefix, prompt=prompt)
        count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached({"stack": ["company", "alice"]}) == 0
    assert cached({"stack": ["company@1", "alice@latest"]}) > 0
    assert cached({"stack": ["alice", "company"]}) == 0
    assert cached({"blend": {"alice": 0.5, "bob": 0.5}}) == 0
    assert cached({"blend": {"alice": 0.75, "bob": 0.25}}) == 0
    assert cached({"blend": {"bob": 0.5, "alice": 0.5}}) > 0


def test_a_composition_wins_over_the_prefix_of_the_user(
    client: TestClient, parts: dict[str, str]
) -> None:
    client.put("/v1/users/ann/prefix", json={"prefix": "bob"})
    answer = complete(client, {"stack": ["company", "alice"]}, user="ann")
    assert text_of(answer) == answer_under(Kind.STACK, [parts["company"], parts["alice"]])
    assert answer.json()["prefix"]["chosen_by"] == "prefix"


@pytest.mark.usefixtures("parts")
def test_a_stack_with_a_text_has_the_opening_tokens_and_the_chat_is_behind_it(
    client: TestClient, parts: dict[str, str]
) -> None:
    body = {
        "model": "tiny",
        "prefix": {"stack": ["alice", "company"]},
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 6,
    }
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    expected = answer_under(
        Kind.STACK, [parts["alice"], parts["company"]], prompt="user: hi\nassistant: "
    )
    assert answer.json()["choices"][0]["message"]["content"] == expected
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        chunks = [
            json.loads(line.removeprefix("data: "))
            for line in stream.iter_lines()
            if line.startswith("data: {")
        ]
    assert {chunk["prefix"]["kind"] for chunk in chunks} == {"stack"}


def test_prompt_tokens_are_scored_behind_a_stack_and_a_blend(
    client: TestClient, parts: dict[str, str]
) -> None:
    for prefix, num_unscored in (
        ({"stack": ["company", "alice"]}, 1),
        ({"blend": {"alice": 0.5, "bob": 0.5}}, 0),
    ):
        answer = complete(client, prefix, prompt_logprobs=0)
        assert answer.status_code == 200, answer.text
        scores = answer.json()["choices"][0]["prompt_logprobs"]
        assert [score is None for score in scores].count(True) == num_unscored


def test_virtual_tokens_of_a_blend_stand_inside_a_prompt(
    client: TestClient, parts: dict[str, str]
) -> None:
    part = {"type": "prefix", "from": 1, "to": 4}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}],
        "max_tokens": 6,
    }
    blend = {"blend": {"alice": 0.5, "bob": 0.5}}
    assert client.post("/v1/chat/completions", json=body | {"prefix": blend}).status_code == 200
    stack = {"stack": ["alice", "bob"]}
    refused = client.post("/v1/chat/completions", json=body | {"prefix": stack})
    assert error_of(refused)["code"] == "misplaced_prefix"
    assert "the stack of alice@1, bob@1" in error_of(refused)["message"]


# -- recipes ----


def test_a_recipe_that_all_members_share_is_applied(client: TestClient) -> None:
    recipe = {"prompt_template": "Q: {prompt} A:", "recipe": {"max_tokens": 3}}
    digests = [
        put_soft(client, name, recipe, fill=fill)["digest"]
        for name, fill in (("alice", 0.25), ("bob", 0.75))
    ]
    text = put_text(client, "company", "Be kind.")["digest"]
    answer = complete(client, {"stack": ["company", "alice", "bob"]}, apply_recipe=True)
    assert "warnings" not in answer.json()
    expected = answer_under(Kind.STACK, [text, *digests], prompt=f"Q: {PROMPT} A:")
    assert text_of(answer) == expected
    chat = {
        "model": "tiny",
        "prefix": {"blend": {"alice": 0.5, "bob": 0.5}},
        "messages": [{"role": "user", "content": PROMPT}],
    }
    body = client.post("/v1/chat/completions", json=chat).json()
    assert body["usage"]["completion_tokens"] == 3


def test_recipes_that_differ_are_not_applied_and_named(client: TestClient) -> None:
    for name, fill in (("alice", 0.25), ("bob", 0.75)):
        put_soft(client, name, {"recipe": {"temperature": fill}}, fill=fill)
    answer = complete(client, {"blend": {"alice": 0.5, "bob": 0.5}})
    warning = "no recipe is applied: those of alice@1, bob@1 differ"
    assert answer.json()["warnings"] == [warning]


# -- what is refused ----


@pytest.mark.parametrize(
    ("prefix", "param", "said"),
    [
        ({}, "prefix", "exactly one of 'stack', 'blend' and 'ensemble'; received none of them"),
        ({"stack": ["a"], "blend": {"a": 0.5, "b": 0.5}}, "prefix", "'stack' and 'blend'"),
        ({"stack": []}, "prefix.stack", "at least 1 entry"),
        ({"stack": ["a"] * 17}, "prefix.stack", "at most 16 entries"),
        ({"stack": ["a"], "combine": "vote"}, "prefix.combine", "only with 'ensemble'"),
        ({"stack": "a"}, "prefix.stack", "a list"),
        ({"stack": ["a b"]}, "prefix.stack[0]", "a text of the form"),
        ({"blend": {"a": 1.0}}, "prefix.blend", "at least 2 entries"),
        ({"blend": {"a": 0.5, "b": 0.6}}, "prefix.blend", "with the sum 1; received the sum 1.1"),
        ({"blend": {"a": 1.0, "b": 0}}, "prefix.blend.b", "more than 0"),
        ({"blend": {"a": "x", "b": 0.5}}, "prefix.blend.a", "a number"),
        ({"ensemble": ["a"]}, "prefix.ensemble", "at least 2 entries"),
        ({"ensemble": ["a"] * 9}, "prefix.ensemble", "at most 8 entries"),
        ({"ensemble": ["a", "b"], "combine": "max"}, "prefix.combine", "mean_logprob"),
        ({"stack": ["a"], "weights": [1]}, "prefix.weights", "unknown field"),
        ("a", "prefix", "an object"),
    ],
)
def test_a_malformed_composition_is_refused_with_its_place(
    client: TestClient, prefix: object, param: str, said: str
) -> None:
    error = error_of(refused := complete(client, prefix))
    assert refused.status_code == 400
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ({"stack": ["company", "kv"]}, "kv@1: expected a KV prefix only in front of a stack"),
        ({"blend": {"alice": 0.5, "company": 0.5}}, "company@1: expected soft prompts in a blend"),
        ({"blend": {"alice": 0.5, "kv": 0.5}}, "received the kind kv_prefix"),
        ({"blend": {"alice": 0.5, "long": 0.5}}, "(4 virtual tokens, as alice@1 has); received 6"),
        ({"stack": ["system", "alice"]}, "system@1: expected texts with the role raw in a stack"),
        ({"stack": ["placed"]}, "received some that its prompt_template places"),
    ],
)
@pytest.mark.usefixtures("parts")
def test_versions_that_cannot_be_members_are_refused_by_name(
    client: TestClient, prefix: object, said: str
) -> None:
    put_soft(client, "long", rows=6)
    put_text(client, "system", "You are kind.", role="system")
    put_soft(client, "placed", {"prompt_template": "{prefix:0:2}{prompt}{prefix:2:4}"})
    error = error_of(refused := complete(client, prefix))
    assert (refused.status_code, error["code"]) == (400, "unsupported_member")
    assert error["param"] == "prefix"
    assert said in error["message"]


@pytest.mark.usefixtures("parts")
def test_a_composition_needs_the_base_as_model(client: TestClient) -> None:
    error = error_of(refused := complete(client, {"stack": ["alice"]}, model="bob"))
    assert (refused.status_code, error["param"]) == (400, "model")
    assert "expected the base 'tiny' as 'model'" in error["message"]


@pytest.mark.usefixtures("parts")
def test_a_composition_is_as_long_as_a_prefix_may_be(client: TestClient, world: World) -> None:
    put_text(client, "long", "x" * 60)
    error = error_of(complete(client, {"stack": ["long", "alice", "bob"]}))
    assert error["code"] == "too_many_virtual_tokens"
    assert error["message"] == (
        "expected at most 64 virtual tokens; the stack of long@1, alice@1, bob@1 has 68"
    )
    assert not resident(world)


MISSING: list[dict[str, Any]] = [
    {"stack": ["mine", "NAME"]},
    {"blend": {"mine": 0.5, "NAME": 0.5}},
    {"ensemble": ["mine", "NAME"]},
]


TURN = [{"role": "user", "content": "x"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": TURN},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": TURN, "max_tokens": 4},
}


def without_ids(answer: Any) -> str:
    """A response, without the id of its request."""
    text: str = answer.text
    return text.replace(answer.headers["x-request-id"], "")


@pytest.mark.parametrize("prefix", MISSING, ids=lambda prefix: next(iter(prefix)))
@pytest.mark.parametrize("route", ROUTES)
def test_a_member_of_another_tenant_is_the_same_404_as_a_missing_one(
    client: TestClient, world: World, prefix: dict[str, Any], route: str
) -> None:
    put_soft(client, "mine")

    def ask(reference: str) -> Any:
        composed = json.loads(json.dumps(prefix).replace("NAME", reference))
        body = {"model": "tiny", "prefix": composed, **ROUTES[route]}
        return client.post(route, json=body)

    references = ("theirs", "theirs@1", "theirs@prod")
    missing = [ask(reference) for reference in references]
    with acting(client, world, "beta") as beta:
        put_soft(beta, "theirs", fill=0.9)
        beta.put("/v1/prefixes/theirs/aliases/prod", json={"version": 1})
    foreign = [ask(reference) for reference in references]
    assert [answer.status_code for answer in (*missing, *foreign)] == [404] * 6
    assert list(map(without_ids, missing)) == list(map(without_ids, foreign))
    for reference, answer in zip(references, missing, strict=True):
        assert repr(reference) in answer.json()["error"]["message"]
    if route == "/v1/completions":
        error = error_of(missing[0])
        assert (error["code"], error["param"]) == ("prefix_not_found", "prefix")


def test_equal_members_of_two_tenants_share_nothing(client: TestClient, world: World) -> None:
    stack = {"stack": ["alice", "company"]}
    put_soft(client, "alice")
    put_text(client, "company", HIDDEN)
    prompt = PROMPT * 8
    for _ in range(2):
        mine = complete(client, stack, prompt=prompt)
    with acting(client, world, "beta") as beta:
        put_soft(beta, "alice")
        put_text(beta, "company", HIDDEN)
        theirs = complete(beta, stack, prompt=prompt)
    assert text_of(mine) == text_of(theirs)
    assert mine.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert theirs.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len(resident(world)) == 2


# -- parsing ----

REFERENCES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}(@[A-Za-z0-9]{1,5})?", fullmatch=True)


@given(
    st.dictionaries(REFERENCES, st.integers(1, 1000), min_size=2, max_size=16),
    st.floats(-0.5, 0.5),
)
def test_weights_are_accepted_where_their_sum_is_1(shares: dict[str, int], more: float) -> None:
    total = sum(shares.values())
    blend = {name: share / total for name, share in shares.items()}
    parsed = ComposedPrefix.model_validate({"blend": blend}).composition
    assert (parsed.kind, dict(parsed.members)) == (Kind.BLEND, blend)
    first = next(iter(blend))
    changed = blend | {first: blend[first] + more}
    if abs(more) > 2e-6:
        with pytest.raises(ValidationError):
            ComposedPrefix.model_validate({"blend": changed})
    if abs(more) < 1e-7 and 0 < changed[first] <= 1:
        ComposedPrefix.model_validate({"blend": changed})


@given(st.lists(REFERENCES, min_size=2, max_size=8), st.sampled_from([None, *Combine]))
def test_ensembles_and_stacks_keep_their_order(names: list[str], combine: Combine | None) -> None:
    stack = ComposedPrefix.model_validate({"stack": names}).composition
    assert [name for name, _ in stack.members] == names
    body = {"ensemble": names, "combine": combine}
    ensemble = ComposedPrefix.model_validate_json(json.dumps(body)).composition
    assert [name for name, _ in ensemble.members] == names
    assert ensemble.combine is (combine or Combine.MEAN_LOGPROB)
