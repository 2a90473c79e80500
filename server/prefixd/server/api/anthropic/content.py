"""The messages of a conversation in Anthropic's shape, and as turns of a chat."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.messages import PrefixPart
from prefixd.server.api.generate.shapes import shape_by, unexpected

Identifier = Annotated[str, Field(min_length=1, max_length=256)]


class CacheControl(StrictModel):
    """Where a prompt should be cached. Ignored: equal beginnings of prompts are always shared."""

    type: Literal["ephemeral"]
    ttl: str | None = None


Cached = Annotated[
    CacheControl | None, Field(default=None, description="Ignored: KV is always shared.")
]


class TextBlock(StrictModel):
    """A piece of text."""

    type: Literal["text"]
    text: str
    cache_control: Cached
    citations: Any = Field(default=None, description="Ignored.")
    parsed_output: Any = Field(default=None, description="Ignored: clients add it.")


class ToolUseBlock(StrictModel):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Identifier
    name: Identifier
    input: dict[str, Any]
    cache_control: Cached
    caller: Any = Field(default=None, description="Ignored.")


class ThinkingBlock(StrictModel):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Ignored.")


class RedactedThinkingBlock(StrictModel):
    """What a model thought, for its server alone. Ignored."""

    type: Literal["redacted_thinking"]
    data: str


_UNSUPPORTED = {
    kind: f"this model takes text; {what} are not supported"
    for kind, what in {
        "image": "images",
        "document": "documents",
        "search_result": "search results",
        "container_upload": "uploads",
        "server_tool_use": "tools that the server runs",
        "web_search_tool_result": "tools that the server runs",
    }.items()
}


def _list_or_text(blocks: TypeAdapter[Any], expected: str) -> WrapValidator:
    """A single error for a text or a list, at the place of what is wrong."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        del validate
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return blocks.validate_python(value)
        raise unexpected(expected, value)

    return WrapValidator(check)


_TEXTS = 'a text or a list of blocks {"type": "text", "text": …}'
SystemBlock = Annotated[TextBlock, shape_by("type", {"text": TextBlock}, _UNSUPPORTED)]
Texts = Annotated[str | list[SystemBlock], _list_or_text(TypeAdapter(list[SystemBlock]), _TEXTS)]
"""Text of a system prompt, or of the result of a tool."""


class ToolResultBlock(StrictModel):
    """The result of the call `tool_use_id`."""

    type: Literal["tool_result"]
    tool_use_id: Identifier
    content: Texts = ""
    is_error: bool | None = Field(default=None, description="Ignored: the content says it.")
    cache_control: Cached


_BLOCKS: dict[str, type[StrictModel]] = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "prefix": PrefixPart,
}
_OF_USER = {name: _BLOCKS[name] for name in ("text", "tool_result", "prefix")}
_OF_ASSISTANT = {name: _BLOCKS[name] for name in _BLOCKS if name != "tool_result"}

UserBlock = Annotated[
    TextBlock | ToolResultBlock | PrefixPart, shape_by("type", _OF_USER, _UNSUPPORTED)
]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock | PrefixPart,
    shape_by("type", _OF_ASSISTANT, _UNSUPPORTED),
]
_BLOCK_LIST = "a text or a list of blocks"


class UserMessage(StrictModel):
    """What the user said, and the results of tools."""

    role: Literal["user"]
    content: Annotated[
        str | list[UserBlock], _list_or_text(TypeAdapter(list[UserBlock]), _BLOCK_LIST)
    ]


class PastMessage(StrictModel):
    """What the model said, thought and called. The last message of a conversation is continued."""

    role: Literal["assistant"]
    content: Annotated[
        str | list[AssistantBlock], _list_or_text(TypeAdapter(list[AssistantBlock]), _BLOCK_LIST)
    ]


class SystemMessage(StrictModel):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: Texts


Message = Annotated[
    UserMessage | PastMessage | SystemMessage,
    shape_by("role", {"user": UserMessage, "assistant": PastMessage, "system": SystemMessage}),
]

Turn = dict[str, Any]


def text_of(texts: str | Iterable[TextBlock]) -> str:
    """The text of blocks, each on lines of its own."""
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts)


def turns_of(messages: Iterable[UserMessage | PastMessage | SystemMessage]) -> list[Turn]:
    """The messages of a chat. Messages of one role that follow one another are one turn; results
    of tools are turns of their own."""
    turns: list[Turn] = []
    for message in messages:
        if isinstance(message, SystemMessage):
            turns.append({"role": "system", "content": text_of(message.content)})
        elif isinstance(message.content, str):
            _add(turns, message.role, message.content)
        else:
            for block in message.content:
                _add_block(turns, message.role, block)
    return [turn for turn in turns if set(turn) != {"role"}]


def _add_block(turns: list[Turn], role: str, block: StrictModel) -> None:
    match block:
        case TextBlock():
            _add(turns, role, {"type": "text", "text": block.text})
        case PrefixPart():
            _add(turns, role, block.model_dump(by_alias=True))
        case ToolResultBlock():
            result = {"role": "tool", "tool_call_id": block.tool_use_id}
            turns.append({**result, "content": text_of(block.content)})
        case ToolUseBlock():
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            called = {"id": block.id, "function": function}
            _open(turns, role).setdefault("tool_calls", []).append(called)
        case ThinkingBlock():
            turn = _open(turns, role)
            turn["reasoning_content"] = turn.get("reasoning_content", "") + block.thinking


def _add(turns: list[Turn], role: str, content: str | dict[str, Any]) -> None:
    """Add a text or a part to the turn of ``role``; a text alone stays one."""
    turn = _open(turns, role)
    if "content" not in turn and isinstance(content, str):
        turn["content"] = content
    else:
        before = turn.get("content", [])
        turn["content"] = [*(_parts(before) if before else ()), *_parts(content)]


def _parts(content: str | dict[str, Any] | list[Any]) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else [content]


def _open(turns: list[Turn], role: str) -> Turn:
    """The last turn, if it is of ``role``, else a new one."""
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role})
    return turns[-1]
