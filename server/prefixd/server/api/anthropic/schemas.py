"""Responses of the Messages API, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import BaseModel

from prefixd.server.api.generate.formatter import PrefixUsed


class TextContent(BaseModel):
    """Text for the reader."""

    type: Literal["text"]
    text: str
    citations: None


class ThinkingContent(BaseModel):
    """What the model thought; nothing signs it."""

    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class ToolUseContent(BaseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OutputTokensDetails(BaseModel):
    """``thinking_tokens`` are those of thinking, with its marks."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Token counts; virtual tokens of a prefix are not among them. The prompt has ``input_tokens``
    and ``cache_read_input_tokens``, whose KV was shared."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageObject(BaseModel):
    """Response of POST /v1/messages, with the prefix that was used."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent | ThinkingContent | ToolUseContent]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    prefix: PrefixUsed | None
    warnings: list[str] | None = None


class TokenCount(BaseModel):
    """Response of POST /v1/messages/count_tokens: tokens of the prompt, without virtual ones."""

    input_tokens: int
