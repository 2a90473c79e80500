"""Tokenizers of the kinds that causal models have, built small, and what transformers decodes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = (
    "One day in winter there was a small house in the forest and a dog lived in it. "
    "The quick brown fox jumps over the lazy dog. It doesn't, isn't and won't bark! "
    "def main(args):\n    return [x for x in args if x > 0]\n\n"
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627 "
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002 \u65e5\u672c\u8a9e "
) * 8
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    " [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Kind:
    """A tokenizer, and texts that a model with it might be given and write."""

    tokenizer: Any
    prompt: str
    output: str


def byte_level(*, added: Sequence[str] = CHAT_TOKENS, words: Sequence[str] = ()) -> Any:
    """As GPT-2: bytes in an alphabet of letters."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    plain.train_from_iterator([CORPUS], trainer)
    plain.add_special_tokens([AddedToken(text, normalized=False) for text in added])
    plain.add_tokens([AddedToken(text, normalized=False) for text in words])
    return wrapped(plain, eos_token="<|endoftext|>")


def sentencepiece(
    *,
    dummy_prefix: bool = True,
    vocab_size: int = 460,
    template: str = "<s> $A",
    added: Sequence[str] = (),
) -> Any:
    """As Llama 2 (with ``dummy_prefix``) and Gemma: words with their space, and bytes."""
    plain = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        show_progress=False,
        limit_alphabet=vocab_size - 320,
    )
    plain.train_from_iterator([CORPUS], trainer)
    state = json.loads(plain.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    state["pre_tokenizer"] = None
    plain = tokenizers.Tokenizer.from_str(json.dumps(state))
    replace = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        plain.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        plain.normalizer = replace
    plain.decoder = decoders.Sequence(steps)
    ids = [(text, plain.token_to_id(text)) for text in ("<s>", "</s>")]
    plain.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    plain.add_special_tokens([AddedToken(text, normalized=False) for text in added])
    return wrapped(plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    """As XGLM: whole words, and a decoder that drops the first space."""
    plain = tokenizers.Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    plain.train_from_iterator([CORPUS], trainer)
    return wrapped(plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    """As BERT: words, and continuations that begin with ##."""
    plain = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    plain.normalizer = normalizers.BertNormalizer()
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    plain.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    plain.train_from_iterator([CORPUS], trainer)
    return wrapped(plain, eos_token="[SEP]", unk_token="[UNK]")


def suffix_bpe() -> Any:
    """As the first GPT: a token says whether a word ends, so a space depends on the next one."""
    plain = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "</s>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    plain.train_from_iterator([CORPUS], trainer)
    return wrapped(plain, eos_token="</s>", unk_token="<unk>")


def words_only() -> Any:
    """Without a decoder: words, joined by spaces."""
    vocabulary = {word: i for i, word in enumerate(["</s>", *sorted(set(CORPUS.split()))])}
    plain = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(plain, eos_token="</s>")


def wrapped(plain: Any, **special: str) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, clean_up_tokenization_spaces=False, **special
    )


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


@cache
def kinds() -> dict[str, Kind]:
    """The tokenizers by kind."""
    tale, code = "One day in winter", "def main(args):\n"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    return {
        "byte-level": Kind(with_template(byte_level(), CHATML), tale, " there was a  dog.\n"),
        "SentencePiece, dummy prefix": Kind(sentencepiece(), code, "    return  args\n"),
        "SentencePiece, no dummy prefix": Kind(
            sentencepiece(dummy_prefix=False), code, "    return  args\n"
        ),
        "byte fallback": Kind(sentencepiece(vocab_size=330), "na\u00efve", " caf\u00e9\n\n\u20ac5"),
        "added tokens beyond the embeddings": Kind(
            byte_level(words=("<think>", "\u00e9", "two words")), tale, "<think>two words</think>"
        ),
        "no BOS": Kind(sentencepiece(template="$A"), "", "One day in winter"),
        "add_eos_token": Kind(sentencepiece(template="<s> $A </s>"), tale, " there was"),
        "no template": Kind(byte_level(added=()), tale, " there\twas"),
        "template with BOS": Kind(
            with_template(sentencepiece(added=CHAT_TOKENS), INST), "[INST] dog [/INST]", " It isn't"
        ),
        "right-to-left and CJK": Kind(
            sentencepiece(),
            "\u05e9\u05dc\u05d5\u05dd",
            " \u05e2\u05d5\u05b9\u05dc\u05dd \u4eca\u5929\u3002 \u0645\u0631\u062d\u064e\u0628",
        ),
        "emoji, byte-level": Kind(byte_level(), "Look: ", f"\U0001f600{family}\u2764\ufe0f!"),
        "emoji, byte fallback": Kind(sentencepiece(), "Look: ", f"\U0001f600{family}\u2764\ufe0f!"),
        "Unigram": Kind(unigram(), tale, " there was"),
        "WordPiece": Kind(word_piece(), tale, " there was, isn't it?"),
        "BPE with word ends": Kind(suffix_bpe(), tale, " there was a lazy dog"),
        "no decoder": Kind(words_only(), tale, " there was a"),
    }


def decode(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return text


def special_ids(tokenizer: Any) -> list[int]:
    """Tokens that are left out of a text."""
    added = tokenizer.added_tokens_decoder
    return sorted(token_id for token_id, token in added.items() if token.special)


def expected_text(tokenizer: Any, prompt: Sequence[int], output: Sequence[int]) -> str:
    """What transformers decodes prompt and output to, less the prompt's text; if the output
    completes a character that the prompt began, less the text before that character."""
    whole, before = decode(tokenizer, [*prompt, *output]), decode(tokenizer, prompt)
    if not whole.startswith(before) and before.endswith("\ufffd"):
        hidden = special_ids(tokenizer)
        visible = [token for token in prompt if token not in hidden]
        shorter = [decode(tokenizer, visible[:-count]) for count in (1, 2, 3)]
        before = next(text for text in [before[:-1], *shorter] if whole.startswith(text))
    return whole[len(before) :]
