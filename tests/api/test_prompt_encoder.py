"""Where token borders are in a prompt with virtual tokens, and where opening tokens."""

from dataclasses import replace

import pytest

from prefixd.server.api.generate.prompts import PromptEncoder
from prefixd.server.api.placement import Layout, lay_out, template_layout
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.inputs import PLACEHOLDER
from prefixd.server.errors import BadRequest
from prefixd.server.model.tokenizer import Tokenizer
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.template import PROMPT, Piece, Rows
from tests.api.api_world import BASE, DECODER
from tests.model.test_opening_tokens import BOS, EOS, byte_tokenizer
from tests.model.tokenizer_kinds import sentencepiece

V = PLACEHOLDER


def encoder(tokenizer: Tokenizer) -> PromptEncoder:
    return PromptEncoder(
        ServedModel(
            name="tiny",
            base=BASE,
            decoder=DECODER,
            max_positions=400,
            vocab_size=1000,
            logits_size=1000,
            eos_token_ids=frozenset(),
            created=0,
            tokenizer=tokenizer,
        )
    )


def layout(template: str, count: int = 8) -> Layout:
    found = template_layout(template, kind=Kind.SOFT_PROMPT, num_virtual_tokens=count)
    assert found is not None
    return found


def ids(text: str) -> list[int]:
    return byte_tokenizer("<s> $A").encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        ("{prefix:0:6}A {prompt}{prefix:6:8}:", [BOS, *ids("A x"), V, V, *ids(":")]),
        ("{prompt}{prefix:0:6} B{prefix:6:8}", [BOS, *ids("x"), *[V] * 6, *ids(" B"), V, V]),
        ("{prefix:6:8}{prompt}", [BOS, *ids("x")]),
        ("A{prefix:0:8}{prompt}", [BOS, *ids("A"), *[V] * 8, *ids("x")]),
    ],
)
def test_opening_tokens_come_before_the_first_run_alone(template: str, tokens: list[int]) -> None:
    found = encoder(byte_tokenizer("<s> $A </s>")).completion(
        "x", layout(template), continues=False
    )
    assert list(found.token_ids) == tokens
    assert found.num_tokens == len([token for token in tokens if token != V])


def test_template_and_prompt_are_one_run_and_special_tokens_in_a_prompt_count_as_such() -> None:
    tokenizer = Tokenizer(sentencepiece())
    for words in ("b", " b", "the cat", "</s>", "{prefix:0:4}"):
        (start, rest) = encoder(tokenizer), layout("{prefix:0:4}a{prompt}c{prefix:4:8}the")
        found = start.completion(words, rest, continues=False)
        whole = tokenizer.encode(f"a{words}c")
        assert list(found.token_ids[: len(whole)]) == whole
        assert found.rows == ((len(whole), Rows(4, 8)),)
        behind = tokenizer.encode("the", add_special_tokens=False)
        assert list(found.token_ids[len(whole) + 4 :]) == behind
    written = encoder(byte_tokenizer("<s> $A")).completion(
        "a</s>", layout("{prompt}{prefix:0:8}"), continues=False
    )
    assert list(written.token_ids) == [BOS, *ids("a"), EOS, *[V] * 8]


def test_token_ids_are_a_run_of_their_own() -> None:
    tokens = encoder(byte_tokenizer("<s> $A"))
    found = tokens.completion([7, 8], layout("A{prompt}{prefix:0:8}B"), continues=False)
    assert list(found.token_ids) == [BOS, *ids("A"), 7, 8, *[V] * 8, *ids("B")]
    found = tokens.completion([7, 8], layout("{prompt}{prefix:0:8}"), continues=False)
    assert list(found.token_ids) == [7, 8, *[V] * 8], "token ids get no opening tokens"
    with pytest.raises(BadRequest, match="received -2"):
        tokens.completion([7, PLACEHOLDER], layout("{prompt}{prefix:0:8}"), continues=False)


def test_an_empty_prompt_needs_something_else_in_its_place() -> None:
    tokens = encoder(byte_tokenizer(None))
    with pytest.raises(BadRequest, match="at least one token"):
        tokens.completion("", layout("{prefix:0:8}{prompt}"), continues=False)
    found = tokens.completion("", layout("{prompt}{prefix:0:8}"), continues=False)
    assert (found.token_ids, found.num_tokens) == ((V,) * 8, 0)


@pytest.mark.parametrize(
    ("pieces", "front", "behind"),
    [
        (["a"], [(0, 8)], ["a"]),
        ([Rows(0, 8), "a"], [(0, 8)], ["a"]),
        ([Rows(0, 3), Rows(3, 8), "a"], [(0, 8)], ["a"]),
        ([Rows(3, 8), Rows(0, 3), "a"], [(3, 8), (0, 3)], ["a"]),
        (["a", Rows(2, 4)], [(0, 2), (4, 8)], ["a", Rows(2, 4)]),
        ([Rows(6, 8), "a", Rows(0, 2)], [(2, 8)], ["a", Rows(0, 2)]),
        ([PROMPT, Rows(0, 8)], [], [PROMPT, Rows(0, 8)]),
    ],
)
def test_what_stands_in_front(
    pieces: list[Piece], front: list[tuple[int, int]], behind: list[Piece]
) -> None:
    found = lay_out(pieces, 8)
    assert found == replace(found, front=tuple(front), pieces=tuple(behind))
    assert found.num_front == sum(stop - start for start, stop in front)
