"""Opening and closing tokens: one BOS at the start of a sequence, and no EOS at the end of one."""

import pytest
import tokenizers
import transformers

from prefixd.server.model.tokenizer import Tokenizer


def byte_tokenizer(template: str | None) -> Tokenizer:
    """One token for each byte, ``<s>`` and ``</s>``; ``template`` is the post-processor's."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    plain.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        special = [(word, plain.token_to_id(word)) for word in ("<s>", "</s>")]
        plain.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    return Tokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
        )
    )


BOS, EOS = 256, 257


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        ("<s> $A", [BOS]),
        ("<s> $A </s>", [BOS]),
        ("$A </s>", []),
        ("<s> <s> $A </s> </s>", [BOS, BOS]),
        (None, []),
    ],
)
def test_a_text_gets_the_opening_tokens_and_no_closing_ones(
    template: str | None, opening: list[int]
) -> None:
    tokenizer = byte_tokenizer(template)
    plain = tokenizer.encode("a dog", add_special_tokens=False)
    assert len(plain) == 5
    assert tokenizer.encode("a dog") == opening + plain
    assert tokenizer.encode_prefix("a dog") == opening + plain
    assert tokenizer.without_opening(opening + plain) == plain
    assert tokenizer.closing == [EOS] * (template or "").count("</s>")


def test_a_written_closing_token_stays() -> None:
    tokenizer = byte_tokenizer("<s> $A </s>")
    assert tokenizer.encode("a</s>")[-1] == EOS
    assert tokenizer.encode_prefix("</s>") == [BOS, EOS]


def test_a_text_prefix_that_begins_with_the_opening_token_has_it_once() -> None:
    tokenizer = byte_tokenizer("<s> $A </s>")
    assert tokenizer.encode_prefix("<s>a") == tokenizer.encode_prefix("a")
    led = tokenizer.encode_prefix("\n <s>a")
    assert (led.count(BOS), led[2]) == (1, BOS)
    assert tokenizer.encode_prefix("a<s>b").count(BOS) == 2


def test_only_opening_tokens_that_begin_a_text_are_removed() -> None:
    tokenizer = byte_tokenizer("<s> $A")

    def remaining(text: str) -> list[int]:
        return tokenizer.without_opening(tokenizer.encode(text, add_special_tokens=False))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert remaining("<s>a<s>b") == ids("a<s>b")
    assert remaining("\n\t <s>a") == ids("\n\t a")
    assert remaining("a<s>b") == ids("a<s>b")
    assert remaining("</s><s>b") == ids("</s><s>b")
    assert remaining("") == []


def test_a_turn_marker_that_is_the_bos_token_stays_when_the_tokenizer_adds_none() -> None:
    """As in SmolLM2, whose BOS opens every turn of a conversation."""
    tokenizer = byte_tokenizer(None)
    turn = tokenizer.encode("<s>user", add_special_tokens=False)
    assert turn[0] == BOS
    assert tokenizer.without_opening(turn) == turn
