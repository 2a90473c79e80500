"""The turns of a conversation, as a chat completion receives them."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.shapes import refusal, shape_by, unexpected


class TextPart(StrictModel):
    """A piece of text content."""

    type: Literal["text"]
    text: str


class PrefixPart(StrictModel):
    """Virtual tokens `from` to `to - 1` of the soft prompt that the request names, at this place of
    the message. Those that no part names stand in front of the conversation."""

    type: Literal["prefix"]
    start: int = Field(alias="from")
    stop: int = Field(alias="to")


_UNSUPPORTED_PARTS = {
    kind: f"this model takes text; {what} are not supported"
    for kind, what in {
        "image_url": "images",
        "input_image": "images",
        "image": "images",
        "input_audio": "audio parts",
        "audio_url": "audio parts",
        "video_url": "videos",
        "video": "videos",
        "file": "files",
        "input_file": "files",
    }.items()
}

Part = Annotated[
    TextPart | PrefixPart,
    shape_by("type", {"text": TextPart, "prefix": PrefixPart}, _UNSUPPORTED_PARTS),
]
_PARTS = TypeAdapter(list[Part])
_CONTENT = (
    'a text or a list of text parts {"type": "text", "text": …} and prefix parts '
    '{"type": "prefix", "from": 0, "to": 4}'
)


def _check_content(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A single error for the union, at the place of what is wrong."""
    del validate
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _PARTS.validate_python(value)
    raise unexpected(_CONTENT, value)


Content = Annotated[str | list[Part], WrapValidator(_check_content)]
Name = Annotated[str, Field(max_length=64)]


def _check_arguments(text: str) -> str:
    if text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise refusal(
                'expected the JSON text of an object, such as \'{"city": "Oslo"}\'; received '
                f"a text of {len(text)} characters that is none"
            )
    return text


Arguments = Annotated[str, AfterValidator(_check_arguments)]
"""The JSON text of the arguments of a call: an object, or nothing."""


class CalledFunction(StrictModel):
    """A function that was called; `arguments` is the JSON text of an object."""

    name: str = Field(min_length=1, max_length=256)
    arguments: Arguments


class ToolCall(StrictModel):
    """A call in a past turn of the assistant."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, description="Ignored: streams have it.")


class _Turn(StrictModel):
    """What all turns have."""

    name: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_extras(cls, data: Any) -> Any:
        """Turns received from OpenAI have fields that are empty."""
        if not isinstance(data, dict):
            return data
        if "reasoning" in data:  # vLLM's newer name
            data = {"reasoning_content": data["reasoning"], **data}
            del data["reasoning"]
        return {
            name: value
            for name, value in data.items()
            if name not in _EMPTY_EXTRAS or value not in _EMPTY
        }


_EMPTY: tuple[Any, ...] = (None, [])
_EMPTY_EXTRAS = (
    "refusal",
    "audio",
    "function_call",
    "tool_calls",
    "annotations",
    "prefix",
    "reasoning_content",
)


class SystemTurn(_Turn):
    """Instructions. `developer` counts as `system`."""

    role: Literal["system", "developer"]
    content: Content


class UserTurn(_Turn):
    """What the user said."""

    role: Literal["user"]
    content: Content


class AssistantTurn(_Turn):
    """What the model said: text, calls of tools, or both."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] = Field(default=[], max_length=256)
    reasoning_content: str | None = Field(
        default=None, description="For templates that show it; most drop that of past turns."
    )

    @model_validator(mode="after")
    def _check_content(self) -> "AssistantTurn":
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise unexpected(
                f"{_CONTENT}, except in a turn with 'tool_calls'", None, at=("content",)
            )
        return self


class ToolTurn(_Turn):
    """The result of the call `tool_call_id`."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(min_length=1, max_length=256)


ChatMessage = SystemTurn | UserTurn | AssistantTurn | ToolTurn

Message = Annotated[
    ChatMessage,
    shape_by(
        "role",
        {
            "system": SystemTurn,
            "developer": SystemTurn,
            "user": UserTurn,
            "assistant": AssistantTurn,
            "tool": ToolTurn,
        },
    ),
]
"""One turn of a conversation."""
