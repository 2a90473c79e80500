"""The tokenizer as the API calls it."""

from typing import Any

import pytest

from prefixd.server.model.detokenizer import MAX_HELD_BYTES
from prefixd.server.model.tokenizer import Tokenizer
from tests.model.answers import Answer
from tests.model.tokenizer_kinds import byte_level, decode, sentencepiece

TOKENIZER = Tokenizer(byte_level())
FALLBACK = Tokenizer(sentencepiece())


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.backend.token_to_id(token) for token in tokens]


def test_bytes_of_a_token_are_those_it_adds_to_the_text() -> None:
    house, dog = ids(FALLBACK, "\u2581house", "\u2581dog")
    newline, half, end = ids(FALLBACK, "<0x0A>", "<0xF0>", "</s>")
    assert FALLBACK.token_bytes(dog, house) == b" dog"
    assert FALLBACK.token_bytes(dog, None) == b"dog"
    assert FALLBACK.token_bytes(newline, dog) == b"\n"
    assert FALLBACK.token_bytes(half, dog) == b"\xf0"
    assert FALLBACK.token_bytes(dog, half) == b" dog"
    assert FALLBACK.token_bytes(end, dog) == b"</s>"
    assert FALLBACK.token_bytes(1_000_000, dog) is None


def test_bytes_of_a_byte_level_token_are_those_of_its_letters() -> None:
    half, dog, start = ids(TOKENIZER, "\u00f0", "\u0120dog", "<|im_start|>")
    assert TOKENIZER.token_bytes(half, dog) == b"\xf0"
    assert TOKENIZER.token_bytes(dog, None) == b" dog"
    assert TOKENIZER.token_bytes(start, None) == b"<|im_start|>"


def test_special_tokens_are_written_out_on_request() -> None:
    start, dog = ids(TOKENIZER, "<|im_start|>", "\u0120dog")
    assert TOKENIZER.written([start, dog]) == "<|im_start|> dog"
    assert TOKENIZER.decode([start, dog]) == " dog"
    assert TOKENIZER.names([start, dog, 1_000_000]) == ["<|im_start|>", "\u0120dog", ""]


def test_a_model_without_a_chat_template_rejects_chats() -> None:
    with pytest.raises(ValueError, match="no chat template; use /v1/completions"):
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}])


def test_the_error_of_a_chat_template_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    inner: Any = TOKENIZER._tokenizer
    monkeypatch.setattr(inner, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}])


def byte_tokens(text: str) -> list[int]:
    return ids(FALLBACK, *(f"<0x{byte:02X}>" for byte in text.encode()))


def test_a_text_in_byte_tokens_alone_is_streamed_by_characters() -> None:
    text = "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22" * 30
    output = byte_tokens(text)
    pieces = [event.text for event in Answer(FALLBACK, [], output).events if event.text]
    assert "".join(pieces) == text == decode(FALLBACK._tokenizer, output)
    assert len(pieces[0]) <= MAX_HELD_BYTES // 3 + 1
    assert set(map(len, pieces[1:])) == {1}


def test_an_invalid_byte_in_a_long_run_leaves_the_characters_before_it() -> None:
    text = "\u0e20" * (MAX_HELD_BYTES // 3 + 5)
    for rest in ([], byte_tokens("a")):
        answer = Answer(FALLBACK, [], [*byte_tokens(text + "\u0e20")[:-1], *rest])
        assert answer.text == text + "\ufffd" * (2 + len(rest))
        assert len(answer.completion()["logprobs"]["tokens"]) == answer.num_tokens
    short = byte_tokens("\u0e20\u0e20")[:-1]
    assert Answer(FALLBACK, [], short).text == "\ufffd" * 5 == decode(FALLBACK._tokenizer, short)


@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_half_of_a_surrogate_is_two_broken_characters(split: int) -> None:
    tokens = ids(TOKENIZER, "\u00ed", "\u0142", "!")  # the bytes ED A0 21
    answer = Answer(TOKENIZER, tokens[:split], [*tokens[split:], *tokens])
    assert answer.text == ("\ufffd\ufffd!" * 2)[split:]
    assert answer.completion()["logprobs"]["text_offset"] == list(range(6 - split))
