"""What is read from a chat template: whether it has tools, how calls are written, thinking."""

import pytest

from prefixd.server.model import chat_template
from tests.api.chat_templates import tokenizer_of


@pytest.mark.parametrize(
    ("kind", "renders", "call_format", "reasons"),
    [
        ("qwen2.5", True, "hermes", False),
        ("qwen3", True, "hermes", True),
        ("thinks at once", True, "hermes", True),
        ("llama3", True, "llama3", False),
        ("mistral", True, "mistral", False),
        ("mistral, named", True, "mistral", False),
        ("plain", False, None, False),
    ],
)
def test_template_says_what_a_model_can(
    kind: str, renders: bool, call_format: str | None, reasons: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    assert chat_template.renders_tools(tokenizer) == renders
    assert chat_template.call_format(tokenizer) == call_format
    assert chat_template.reasons(tokenizer) == reasons
    assert chat_template.names_first(tokenizer) == (kind == "mistral, named")


def test_marks_are_special_tokens_or_text() -> None:
    mistral, qwen = tokenizer_of("mistral"), tokenizer_of("qwen2.5")
    assert "[TOOL_CALLS]" in chat_template.special_tokens(mistral)
    assert "<tool_call>" not in chat_template.special_tokens(qwen)
    for tokenizer, mark in ((mistral, "[TOOL_CALLS]"), (qwen, "<tool_call>")):
        token_id = tokenizer.convert_tokens_to_ids(mark)
        assert chat_template.atomic_ids(tokenizer)[mark] == token_id
