"""``echo`` and ``prompt_logprobs``: prompts and their log-probabilities in answers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.generate.prompt_scores import texts_of
from prefixd.server.api.generate.prompts import PromptTokens
from prefixd.server.api.served import EncoderInfo
from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.engine.inputs import PLACEHOLDER
from prefixd.server.testing import (
    ByteDetokenizer,
    ByteTokenizer,
    FakeEmbeddings,
    fake_generate,
    fake_next_token,
    fake_score,
)
from tests.api.api_world import POOL_BLOCKS, World, error_of, put_text
from tests.api.test_placed_prompts import put_soft
from tests.api.test_stored_file import put_peft

PROMPT = "the quick brown fox jumps over the lazy dog"


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **fields}
    return client.post("/v1/completions", json=body)


def events_of(answer: Any) -> list[Any]:
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def output(prompt: str, count: int = 4) -> str:
    return bytes(fake_generate(None, list(prompt.encode()), count)).decode()


def scores(
    prompt: str, *, digest: str | None = None, before: Sequence[int] = ()
) -> list[float | None]:
    """What FakeRunner gives each byte behind ``before``; the first has none without it."""
    seen = list(before)
    values: list[float | None] = []
    for byte in prompt.encode():
        values.append(fake_score(digest, seen, byte) if seen else None)
        seen.append(byte)
    return values


def behind(digest: str, rows: int) -> dict[str, Any]:
    """A prefix of ``rows`` virtual tokens whose last one is computed with the prompt."""
    last = FakeEmbeddings(f"{digest}[{rows - 1}:{rows}]".encode(), 1).rows()
    return {"digest": f"{digest}[0:{rows - 1}]" if rows > 1 else None, "before": last}


def test_echo_puts_the_prompt_in_front_of_the_text(client: TestClient) -> None:
    choice = complete(client, echo=True).json()["choices"][0]
    assert choice["text"] == PROMPT + output(PROMPT)
    assert choice["logprobs"] is None
    answer = complete(client, echo=True, max_tokens=0).json()
    assert answer["choices"][0]["text"] == PROMPT
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_log_probabilities_of_an_echo_cover_prompt_and_output(client: TestClient) -> None:
    for max_tokens in (0, 1, 4):
        answer = complete(client, echo=True, logprobs=2, max_tokens=max_tokens).json()
        logprobs = answer["choices"][0]["logprobs"]
        text = PROMPT + output(PROMPT)[:max_tokens]
        assert answer["choices"][0]["text"] == text
        assert "".join(logprobs["tokens"]) == text
        assert logprobs["text_offset"] == list(range(len(text)))
        assert logprobs["token_logprobs"] == scores(PROMPT) + [-0.5] * max_tokens
        assert logprobs["top_logprobs"][0] is None
        for place, token in enumerate(PROMPT[1:], start=1):
            likely = fake_next_token(None, list(PROMPT[:place].encode()))
            expected = {chr(likely): -0.5, chr(likely + 1): -1.5}
            expected.setdefault(token, fake_score(None, list(PROMPT[:place].encode()), ord(token)))
            assert logprobs["top_logprobs"][place] == expected


def test_each_of_several_prompts_of_token_ids_is_scored(client: TestClient) -> None:
    """As lm-evaluation-harness asks."""
    texts = ["one", "another one", "x"]
    body = {"prompt": [list(text.encode()) for text in texts], "max_tokens": 1, "seed": 1234}
    answer = complete(client, **body, logprobs=1, echo=True, temperature=0, n=2).json()
    assert len(answer["choices"]) == 2 * len(texts)
    for choice in answer["choices"]:
        text = texts[choice["index"] // 2]
        assert choice["text"] == text + output(text, 1)
        assert choice["logprobs"]["token_logprobs"] == [*scores(text), -0.5]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_the_first_token_is_scored_behind_a_text_or_a_soft_prompt(
    client: TestClient, world: World
) -> None:
    digests = {
        "voice": put_text(client, "voice", "terse", world.headers())["digest"],
        "one": put_text(client, "one", "a", world.headers())["digest"],
        "soft": put_soft(client, "soft").json()["digest"],
    }
    for name, rows in (("voice", 5), ("one", 1), ("soft", 8)):
        under = behind(digests[name], rows)
        answer = complete(
            client, model=name, echo=True, logprobs=0, prompt_logprobs=1, return_token_ids=True
        ).json()
        choice = answer["choices"][0]
        assert choice["text"].startswith(PROMPT)
        assert choice["logprobs"]["token_logprobs"][: len(PROMPT)] == scores(PROMPT, **under)
        assert choice["logprobs"]["tokens"][: len(PROMPT)] == list(PROMPT)
        assert choice["prompt_token_ids"] == list(PROMPT.encode())
        table = choice["prompt_logprobs"][0][str(ord("t"))]
        assert table["logprob"] == scores(PROMPT, **under)[0]
        assert answer["usage"]["prompt_tokens"] == len(PROMPT)
        assert "terse" not in json.dumps(answer)


def test_keys_and_values_predict_no_first_token(client: TestClient) -> None:
    """PEFT computes no output for their virtual tokens."""
    digest = put_peft(client, "kv", "PREFIX_TUNING")["digest"]
    answer = complete(client, model="kv", echo=True, logprobs=0).json()
    values = answer["choices"][0]["logprobs"]["token_logprobs"][: len(PROMPT)]
    seen = list(PROMPT.encode())
    assert values[0] is None
    assert values[1:] == [fake_score(digest, seen[:i], seen[i]) for i in range(1, len(seen))]


@pytest.mark.parametrize("shown", [{"echo": True, "logprobs": 0}, {"prompt_logprobs": 0}])
def test_the_input_of_an_encoder_is_not_scored(world: World, shown: dict[str, Any]) -> None:
    world.served = replace(world.served, encoder=EncoderInfo((0,), 64, 16))
    with TestClient(world.make_app(), headers=world.headers()) as client:
        answer = complete(client, **shown)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "prompt_not_scored"
        assert error_of(answer)["param"] in shown
        assert complete(client, echo=True, max_tokens=1).json()["choices"][0]["text"][:3] == "the"


def test_virtual_tokens_inside_a_prompt_are_neither_echoed_nor_scored(client: TestClient) -> None:
    template = "Tweet: {prompt}{prefix:0:8} Label:"
    digest = put_soft(client, "tweet", template).json()["digest"]
    choice = complete(client, model="tweet", prompt="hi", echo=True, logprobs=0).json()["choices"][
        0
    ]
    shown = "Tweet: hi Label:"
    assert choice["text"].startswith(shown)
    values = choice["logprobs"]["token_logprobs"][: len(shown)]
    rows = FakeEmbeddings(f"{digest}[0:8]".encode(), 8).rows()
    first, rest = shown[:9], shown[9:]
    assert values == scores(first) + scores(rest, before=[*first.encode(), *rows])
    assert choice["logprobs"]["text_offset"][: len(shown)] == list(range(len(shown)))


def test_a_stream_begins_with_the_echo(client: TestClient) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "n": 2, "prompt": ["hello", PROMPT]}
    whole = complete(client, **fields).json()["choices"]
    events = events_of(complete(client, **fields, stream=True))
    for choice in range(4):
        entries = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice]
        assert entries[0]["text"].startswith(fields["prompt"][choice // 2])
        assert "".join(entry["text"] for entry in entries) == whole[choice]["text"]
        for name, expected in whole[choice]["logprobs"].items():
            parts = [entry["logprobs"][name] for entry in entries if entry["logprobs"]]
            assert [value for part in parts for value in part] == expected
        assert entries[-1]["finish_reason"] == "length"
    events = events_of(complete(client, echo=True, logprobs=1, max_tokens=0, stream=True))
    assert [event["choices"][0]["text"] for event in events] == [PROMPT]
    assert events[0]["choices"][0]["finish_reason"] == "length"


def test_prompt_logprobs_hold_rank_and_text_of_each_token(client: TestClient) -> None:
    choice = complete(client, prompt="ab", prompt_logprobs=2).json()["choices"][0]
    assert choice["text"] == output("ab")
    first, second = choice["prompt_logprobs"]
    assert first is None
    likely = fake_next_token(None, list(b"a"))
    assert second == {
        str(ord("b")): {
            "logprob": fake_score(None, [ord("a")], ord("b")),
            "rank": 2,
            "decoded_token": "b",
        },
        str(likely): {"logprob": -0.5, "rank": 1, "decoded_token": chr(likely)},
        str(likely + 1): {"logprob": -1.5, "rank": 2, "decoded_token": chr(likely + 1)},
    }
    assert complete(client).json()["choices"][0]["prompt_logprobs"] is None


def test_prompt_logprobs_of_a_chat_are_those_of_the_rendered_prompt(client: TestClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = client.post("/v1/chat/completions", json={**body, "prompt_logprobs": 0}).json()
    rendered = "user: hi\nassistant: "
    own = [
        table and table[str(ord(character))]["logprob"]
        for character, table in zip(rendered, answer["prompt_logprobs"], strict=True)
    ]
    assert own == scores(rendered)
    assert all(table is None or len(table) == 1 for table in answer["prompt_logprobs"])


def test_scores_take_no_kv_of_other_requests(client: TestClient, world: World) -> None:
    complete(client)
    before = len(world.runner.steps)
    answer = complete(client, echo=True, logprobs=0).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    steps = world.runner.steps[before:]
    assert sum(len(chunk.tokens) for step in steps for chunk in step.chunks) == len(PROMPT) + 3


def test_no_output_is_a_valid_length(client: TestClient) -> None:
    answer = complete(client, max_tokens=0).json()
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 0,
        "total_tokens": len(PROMPT),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_prompt_without_output_must_fit_the_pool(client: TestClient, world: World) -> None:
    object.__setattr__(world.served, "max_positions", 10_000)
    room = POOL_BLOCKS * 16
    fields: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 0}
    answer = complete(client, prompt="p" * room, **fields)
    assert answer.json()["choices"][0]["text"] == "p" * room
    assert complete(client, prompt="p" * (room + 1), **fields).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"echo": "yes"}, "echo", "a string"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "received -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "received 21"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "'stream': false"),
        (
            {"echo": True, "prompt": None, "prompt_embeds": "AAAA"},
            "prompt_embeds",
            "no tokens to show",
        ),
        ({"max_tokens": -1}, "max_tokens", "received -1"),
    ],
)
def test_wrong_fields_are_named(
    client: TestClient, fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = complete(client, **fields)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param
    assert words in error_of(answer)["message"]


class OpeningDetokenizer(ByteDetokenizer):
    """Token 256 is special."""

    def push(self, token_id: int) -> Sequence[TokenText]:
        return (TokenText("", "<s>"),) if token_id == 256 else super().push(token_id)


class OpeningTokenizer(ByteTokenizer):
    def detokenizer(self, prompt: Sequence[int]) -> ByteDetokenizer:
        return OpeningDetokenizer(prompt)


@pytest.mark.parametrize(
    ("token_ids", "sent", "text", "offsets"),
    [
        ((256, 97, 98), "ab", "ab", [0, 0, 1]),
        ((256, 97, 256, 98), "<s>a<s>b", "<s>a<s>b", [0, 3, 4, 7]),
        ((256, 97, 256, 98), None, "ab", [0, 0, 1, 1]),
        ((97, 195, 164, 98), "aäb", "aäb", [0, 1, 1, 2]),
        ((PLACEHOLDER, 97, PLACEHOLDER, 98), None, "ab", [0, 1]),
        ((97, 195), None, "a\ufffd", [0, 1]),
    ],
    ids=["opening", "written out", "token ids", "two bytes", "virtual", "half a character"],
)
def test_tokens_are_placed_in_the_text(
    token_ids: tuple[int, ...], sent: str | None, text: str, offsets: list[int]
) -> None:
    (shown,) = texts_of([PromptTokens(token_ids, text=sent)], OpeningTokenizer())
    assert shown.text == text
    assert [token.offset for token in shown.tokens] == offsets
    assert [token.token_id for token in shown.tokens] == [t for t in token_ids if t >= 0]
