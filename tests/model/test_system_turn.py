"""The tokens that all conversations under a system turn have in common, by template."""

import pytest

from prefixd.server.model.tokenizer import Tokenizer
from tests.model.test_opening_tokens import byte_tokenizer

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = "<s>Today: {{ strftime_now('%d %b %Y') }}. " + CHATML
IN_LAST_USER_TURN = (
    "<s>{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>"
    "{% if loop.last %}{{ messages[0].content }} {% endif %}{{ m.content }}{% endif %}{% endfor %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
SILENT = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
REFUSING = "{{ raise_exception('no system turns') }}"


def tokenizer_of(template: str | None) -> Tokenizer:
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer._tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "head"),
    [
        (CHATML, "Be kind.", "<system>Be kind."),
        (DATED, "Be kind.", "<s>Today: "),
        (IN_LAST_USER_TURN, "Be kind.", "<s><user>"),
        (TRIMMED, " Be kind. ", "<system>Be kind."),
        (CHATML, "Say <s>", "<system>Say <s>"),
    ],
)
def test_the_common_tokens_end_where_conversations_differ(
    template: str, text: str, head: str
) -> None:
    tokenizer = tokenizer_of(template)
    tokens = tokenizer.encode_system(text)
    assert tokens == tokenizer.encode(head, add_special_tokens=False)
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "How?"}]
    whole = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
    assert whole[: len(tokens)] == tokens


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (SILENT, "does not write the text of a system turn"),
        (REFUSING, "no system turns"),
    ],
)
def test_a_template_without_a_system_turn_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_of(template).encode_system("Be kind.")
