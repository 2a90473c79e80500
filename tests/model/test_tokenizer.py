"""Incremental detokenizing: no text is lost and no incomplete character is returned."""

from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.model.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """A tokenizer with one token for each byte, so that a character takes several tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    )


def byte_fallback() -> Tokenizer:
    """A tokenizer like those of Llama 2, Mistral and Gemma: words, and bytes for the rest."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "a",
        "\u2581a",
        "\u6f22",
        "\u00e9",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    plain = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    )
    decoders = tokenizers.decoders
    plain.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    )


TOKENIZER = byte_level()
FALLBACK = byte_fallback()
BYTE, A, SPACE_A = range(1, 257), 257, 258


@given(text=st.text(max_size=20))
def test_the_pieces_of_a_text_add_up_to_the_text(text: str) -> None:
    detokenizer = TOKENIZER.detokenizer()
    pieces = [detokenizer.push(token) for token in TOKENIZER.encode(text)]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" * text.count("\ufffd"), "")
    assert "".join(pieces) + detokenizer.flush() == text
    assert detokenizer.flush() == ""


def test_flush_returns_an_incomplete_character_as_a_replacement() -> None:
    detokenizer = TOKENIZER.detokenizer()
    tokens = TOKENIZER.encode("né")[:-1]  # n and the first byte of é
    assert [detokenizer.push(token) for token in tokens] == ["n", ""]
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("token_ids", "pieces", "rest"),
    [
        ([A, BYTE[0xC3], BYTE[0xA9], SPACE_A], ["a", "", "\u00e9", " a"], ""),
        ([BYTE[0x42], BYTE[0xF0], A, SPACE_A], ["B", "", "\ufffda", " a"], ""),
        ([BYTE[0x42], BYTE[0xF0], SPACE_A], ["B", "", "\ufffd a"], ""),
        ([A, BYTE[0x42], BYTE[0xF0], BYTE[0x9F]], ["a", "B", "", ""], "\ufffd\ufffd"),
    ],
    ids=["complete", "broken by a word", "broken by a space", "broken by the end"],
)
def test_invalid_bytes_do_not_change_text_already_returned(
    token_ids: list[int], pieces: list[str], rest: str
) -> None:
    """Decoded together, all bytes of the run become replacement characters, but the first ones
    were already returned as text."""
    detokenizer = FALLBACK.detokenizer()
    assert [detokenizer.push(token) for token in token_ids] == pieces
    assert detokenizer.flush() == rest
    assert detokenizer.flush() == ""


@given(token_ids=st.lists(st.integers(0, 260), max_size=12))
def test_any_token_sequence_decodes_without_error_or_lost_words(token_ids: list[int]) -> None:
    detokenizer = FALLBACK.detokenizer()
    text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
    full_text = FALLBACK.decode(token_ids)
    assert len(text) == len(full_text) or "\ufffd" in full_text
    for letter in "a\u6f22":
        assert text.count(letter) >= full_text.count(letter)


def test_special_tokens_produce_no_text() -> None:
    detokenizer = TOKENIZER.detokenizer()
    end = TOKENIZER.encode("<end>")
    assert len(end) == 1
    assert [detokenizer.push(token) for token in end] == [""]
    assert detokenizer.flush() == ""
    assert TOKENIZER.token_text(end[0]) == "<end>"
    assert TOKENIZER.decode(end) == ""


def test_a_model_without_a_chat_template_rejects_chats() -> None:
    with pytest.raises(ValueError, match="no chat template; use /v1/completions"):
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}])


def test_the_error_of_a_chat_template_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    inner: Any = TOKENIZER._tokenizer
    monkeypatch.setattr(inner, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}])
