"""The items of a conversation, as the Responses API receives them, and as turns of a chat."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.messages import Arguments, PrefixPart
from prefixd.server.api.generate.shapes import one_of_words, refusal, shape_by, unexpected

Identifier = Annotated[str, Field(min_length=1, max_length=256)]


class InputText(StrictModel):
    """A piece of text of a message, or of the output of a function."""

    type: Literal["input_text"]
    text: str


class PastText(StrictModel):
    """A piece of text that a model wrote."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]] | None = Field(default=None, description="Ignored.")
    logprobs: list[dict[str, Any]] | None = Field(default=None, description="Ignored.")
    parsed: Any = Field(default=None, description="Ignored: clients add it.")


class RefusalText(StrictModel):
    """What a model said where it refused to answer: text."""

    type: Literal["refusal"]
    refusal: str


_PARTS: dict[str, type[StrictModel]] = {
    "input_text": InputText,
    "output_text": PastText,
    "refusal": RefusalText,
    "prefix": PrefixPart,
}
_UNSUPPORTED_PARTS = {
    kind: f"this model takes text; {what} are not supported"
    for kind, what in {
        "input_image": "images",
        "input_audio": "audio parts",
        "input_file": "files",
    }.items()
}
Part = Annotated[
    InputText | PastText | RefusalText | PrefixPart,
    shape_by("type", _PARTS, _UNSUPPORTED_PARTS),
]
_PART_LIST = TypeAdapter(list[Part])
_CONTENT = (
    'a text or a list of parts {"type": "input_text", "text": …}, of the assistant '
    '{"type": "output_text", "text": …}'
)


def _check_content(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A single error for the union, at the place of what is wrong."""
    del validate
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _PART_LIST.validate_python(value)
    raise unexpected(_CONTENT, value)


Content = Annotated[str | list[Part], WrapValidator(_check_content)]


class _Item(StrictModel):
    """What all items have."""

    id: str | None = Field(default=None, description="Ignored.")
    status: str | None = Field(default=None, description="Ignored.")


class MessageItem(_Item):
    """A message. `developer` counts as `system`."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: str | None = Field(default=None, description="Ignored.")


class FunctionCallItem(_Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Identifier
    name: Identifier
    arguments: Arguments
    parsed_arguments: Any = Field(default=None, description="Ignored: clients add it.")


class FunctionOutputItem(_Item):
    """The result of the call `call_id`."""

    type: Literal["function_call_output"]
    call_id: Identifier
    output: Content


class _ReasoningText(StrictModel):
    type: Literal["summary_text", "reasoning_text"]
    text: str


class ReasoningItem(_Item):
    """What the model thought before the message or the calls that follow."""

    type: Literal["reasoning"]
    summary: list[_ReasoningText] = Field(default=[])
    content: list[_ReasoningText] | None = None
    encrypted_content: str | None = Field(default=None, description="Ignored.")

    @property
    def text(self) -> str:
        """All of it, or its summary."""
        return "\n".join(part.text for part in self.content or self.summary)


_ITEMS: dict[str, type[StrictModel]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}
_STORED = "nothing is stored on this server: send the items themselves"


def _check_item(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """An item as the shape that its type names; one without a type is a message."""
    del validate
    if isinstance(value, tuple(_ITEMS.values())):
        return value
    if not isinstance(value, dict):
        raise unexpected("an object", value)
    kind = value.get("type", "message")
    if not isinstance(kind, str):
        raise unexpected(one_of_words(_ITEMS), kind, at=("type",))
    if kind == "item_reference":
        raise refusal(_STORED, at=("type",), kind="unsupported_at")
    if kind not in _ITEMS:
        raise refusal(
            f"expected {one_of_words(_ITEMS)}; items of other types are not supported",
            at=("type",),
            kind="unsupported_at",
        )
    return _ITEMS[kind].model_validate(value)


InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem, WrapValidator(_check_item)
]
_ITEM_LIST = TypeAdapter(Annotated[list[InputItem], Field(min_length=1, max_length=4096)])


def _check_input(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    del validate
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _ITEM_LIST.validate_python(value)
    raise unexpected("a text or a list of items", value)


Input = Annotated[
    str | Annotated[list[InputItem], Field(min_length=1, max_length=4096)],
    WrapValidator(_check_input),
]
"""A text of the user, or the items of a conversation."""


def turns_of(conversation: str | Iterable[InputItem]) -> list[dict[str, Any]]:
    """The messages of a chat. Reasoning, a message and calls that follow one another are one turn
    of the assistant."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    turns: list[dict[str, Any]] = []
    for item in conversation:
        if isinstance(item, ReasoningItem) and not item.text:
            continue
        turn = _turn_of(item)
        if not turns or not _joins(turns[-1], turn):
            turns.append(turn)
            continue
        calls = [*turns[-1].get("tool_calls", ()), *turn.get("tool_calls", ())]
        turns[-1] |= {**turn, **({"tool_calls": calls} if calls else {})}
    return turns


def _turn_of(item: InputItem) -> dict[str, Any]:
    match item:
        case MessageItem():
            return {"role": item.role, "content": _content(item.content)}
        case FunctionCallItem():
            function = {"name": item.name, "arguments": item.arguments}
            return {
                "role": "assistant",
                "tool_calls": [{"id": item.call_id, "function": function}],
            }
        case FunctionOutputItem():
            content = _content(item.output)
            return {"role": "tool", "tool_call_id": item.call_id, "content": content}
        case ReasoningItem():
            return {"role": "assistant", "reasoning_content": item.text}


def _joins(before: dict[str, Any], turn: dict[str, Any]) -> bool:
    """Whether two turns are one of the assistant: reasoning begins one, and no text is behind
    calls or another text."""
    if before["role"] != "assistant" or turn["role"] != "assistant":
        return False
    return "tool_calls" in turn or (
        "content" in turn and not {"content", "tool_calls"} & set(before)
    )


def _content(content: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, PrefixPart):
            parts.append(part.model_dump(by_alias=True))
        else:
            text = part.refusal if isinstance(part, RefusalText) else part.text
            parts.append({"type": "text", "text": text})
    return parts
