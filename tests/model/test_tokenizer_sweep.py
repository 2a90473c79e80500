"""Every kind of tokenizer: streams, stop strings, log-probabilities and offsets agree with what
transformers decodes the whole to."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefixd.server.engine.request import FinishReason
from prefixd.server.model.tokenizer import Tokenizer
from tests.model.answers import Answer
from tests.model.tokenizer_kinds import decode, expected_text, kinds, special_ids
from tests.model.tokenizer_sweep import TABLE, sweep_table

KINDS = sorted(kinds())


def token_ids(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    """Token ids: any, and often bytes, special tokens and ids without a token."""
    size = len(tokenizer)
    often = [token for token in range(size) if len(decode(tokenizer, [token])) <= 1]
    return st.lists(st.one_of(st.sampled_from(often), st.integers(0, size + 1)), max_size=10)


def check_logprobs(answer: Answer) -> None:
    """Lists as long as the output; offsets within the text; tokens at their offsets."""
    text, logprobs = answer.text, answer.completion()["logprobs"]
    tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert len(tokens) == len(offsets) == len(logprobs["token_logprobs"]) == answer.num_tokens
    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)
    entries = answer.message_logprobs()
    assert [entry["token"] for entry in entries] == [t.removeprefix("bytes:") for t in tokens]
    chunks = [chunk["logprobs"] for chunk in answer.completion_chunks() if chunk["logprobs"]]
    for name, values in logprobs.items():
        assert [value for chunk in chunks for value in chunk[name]] == values


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_agree_with_transformers(kind: str) -> None:
    inner = kinds()[kind].tokenizer
    tokenizer, special = Tokenizer(inner), special_ids(inner)

    @given(prompt=token_ids(inner), output=token_ids(inner).filter(bool))
    def check(prompt: list[int], output: list[int]) -> None:
        answer = Answer(tokenizer, prompt, output)
        assert answer.text == answer.completion()["text"] == expected_text(inner, prompt, output)
        check_logprobs(answer)
        logprobs = answer.completion()["logprobs"]
        for token, text, offset in zip(
            output, logprobs["tokens"], logprobs["text_offset"], strict=True
        ):
            if token not in special and not text.startswith("bytes:"):
                shown = answer.text[offset : offset + len(text)]
                name = inner.convert_ids_to_tokens(token) or ""
                assert shown == text or (shown[:1] == "\ufffd" and name.startswith("<0x"))
        if "\ufffd" not in answer.text + decode(inner, prompt):
            raw = [entry["bytes"] or [] for entry in answer.message_logprobs()]
            parts = zip(output, raw, strict=True)
            joined = bytes(byte for token, part in parts if token not in special for byte in part)
            assert joined.decode() == answer.text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_cut_before_the_first_stop_string(kind: str) -> None:
    inner = kinds()[kind].tokenizer
    tokenizer = Tokenizer(inner)

    @given(prompt=token_ids(inner), output=token_ids(inner).filter(bool), data=st.data())
    def check(prompt: list[int], output: list[int], data: st.DataObject) -> None:
        whole = expected_text(inner, prompt, output)
        parts = [whole[i : i + n] for i in range(len(whole)) for n in range(1, 5)]
        stops = [part for part in parts if "\ufffd" not in part]  # shows part of a character
        if not stops:
            return
        stop = data.draw(st.sampled_from(stops))
        texts = [expected_text(inner, prompt, output[: n + 1]) for n in range(len(output))]
        num_tokens, text = next((n + 1, text) for n, text in enumerate(texts) if stop in text)
        answer = Answer(tokenizer, prompt, output, strings=(stop,))
        assert (answer.end.reason, answer.end.stop) == (FinishReason.STOP, stop)
        assert (answer.text, answer.num_tokens) == (text[: text.index(stop)], num_tokens)
        check_logprobs(answer)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_as_a_stop_string_ends_the_text(kind: str) -> None:
    inner = kinds()[kind].tokenizer
    tokenizer, special = Tokenizer(inner), st.sampled_from(special_ids(inner))

    @given(prompt=token_ids(inner), output=token_ids(inner), end=special, rest=token_ids(inner))
    def check(prompt: list[int], output: list[int], end: int, rest: list[int]) -> None:
        assume(end not in output)
        stop = inner.convert_ids_to_tokens(end)
        assume(stop not in expected_text(inner, prompt, output))
        answer = Answer(tokenizer, prompt, [*output, end, *rest], strings=(stop,))
        assert (answer.end.reason, answer.end.stop) == (FinishReason.STOP, stop)
        assert answer.text == expected_text(inner, prompt, [*output, end])
        assert answer.num_tokens == len(output) + 1
        check_logprobs(answer)

    check()


def test_the_table_of_the_sweep_is_that_of_the_code() -> None:
    """Rewrite it with ``python -m tests.model.tokenizer_sweep``."""
    assert Path(__file__).with_name("tokenizer_sweep.md") == TABLE
    assert sweep_table() == TABLE.read_text(encoding="utf-8")
