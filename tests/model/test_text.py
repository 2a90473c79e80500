"""Incremental text: whatever the pieces, nothing is lost and no half character goes out."""

from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from server.model.text import Tokenizer


def byte_level() -> Tokenizer:
    """A tokenizer with one token for each byte, so that characters come in pieces."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    )


TOKENIZER = byte_level()


@given(text=st.text(max_size=20))
def test_pieces_make_the_whole(text: str) -> None:
    detokenizer = TOKENIZER.detokenizer()
    pieces = [detokenizer.push(token) for token in TOKENIZER.encode(text)]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" * text.count("\ufffd"), "")
    assert "".join(pieces) + detokenizer.flush() == text
    assert detokenizer.flush() == ""


def test_a_broken_character_comes_out_at_the_end() -> None:
    detokenizer = TOKENIZER.detokenizer()
    tokens = TOKENIZER.encode("né")[:-1]  # n and the first byte of é
    assert [detokenizer.push(token) for token in tokens] == ["n", ""]
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_no_text() -> None:
    detokenizer = TOKENIZER.detokenizer()
    end = TOKENIZER.encode("<end>")
    assert len(end) == 1
    assert [detokenizer.push(token) for token in end] == [""]
    assert detokenizer.flush() == ""
    assert TOKENIZER.token_text(end[0]) == "<end>"
    assert TOKENIZER.decode(end) == ""


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(ValueError, match="no chat template; use /v1/completions"):
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}])


def test_a_template_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    inner: Any = TOKENIZER._tokenizer
    monkeypatch.setattr(inner, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        TOKENIZER.render_chat([{"role": "user", "content": "hi"}])
