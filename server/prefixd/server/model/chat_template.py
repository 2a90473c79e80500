"""What a model's chat template and tokenizer say of tools and of thinking."""

from typing import Any

_NAME = "probe_of_tools"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_TURNS = [{"role": "user", "content": "a"}]
_OTHER_CALLS = ("<function=", "<arg_key>")
"""Marks of formats that share ``<tool_call>`` but are not JSON: Qwen3-Coder's and GLM's."""


def renders_tools(tokenizer: Any) -> bool:
    """Whether the chat template shows the tools that it is given."""
    if not tokenizer.chat_template:
        return False
    try:
        text: str = tokenizer.apply_chat_template(_TURNS, tools=[_TOOL], tokenize=False)
    except Exception:  # noqa: BLE001 - a template may raise any exception
        return False
    return _NAME in text


def call_format(tokenizer: Any) -> str | None:
    """The format in which the model writes calls, by the marks in its template; None: unknown."""
    text = _template(tokenizer)
    if "<tool_call>" in text and not any(mark in text for mark in _OTHER_CALLS):
        return "hermes"
    if "[TOOL_CALLS]" in text:
        return "mistral"
    tag = "<|python_tag|>"
    if tag in text or ('"parameters"' in text and tag in tokenizer.get_added_vocab()):
        return "llama3"
    return None


def names_first(tokenizer: Any) -> bool:
    """Whether Mistral's calls are a name and arguments, instead of a list of objects."""
    return "[ARGS]" in _template(tokenizer)


def reasons(tokenizer: Any) -> bool:
    """Whether the model may think before it answers, between ``<think>`` and ``</think>``."""
    marks = {"<think>", "</think>"}
    return "</think>" in _template(tokenizer) or marks <= tokenizer.get_added_vocab().keys()


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The special tokens, which are no part of a text."""
    return frozenset(token.content for token in _added(tokenizer).values() if token.special)


def atomic_ids(tokenizer: Any) -> dict[str, int]:
    """The tokens that llguidance takes for special: it has no text for them, only their ids."""
    return {
        token.content: token_id
        for token_id, token in _added(tokenizer).items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }


def _added(tokenizer: Any) -> dict[int, Any]:
    added: dict[int, Any] = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return added


def _template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.get_chat_template(tools=[_TOOL]))
    except ValueError:  # several templates, none of them the default
        return ""
