"""Responses of generations: whole ones and chunks of streams."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, AliasPath, Field, model_validator

from prefixd.client.types_base import NullIsDefault, ResponseModel
from prefixd.client.types_prefixes import PrefixUsed


class Usage(ResponseModel):
    """Tokens counted by the server, without the virtual tokens of the prefix.

    ``cached_tokens`` of the prompt were not computed: KV reuse supplied their KV.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: Annotated[int, NullIsDefault] = Field(
        default=0,
        validation_alias=AliasChoices(
            "cached_tokens", AliasPath("prompt_tokens_details", "cached_tokens")
        ),
    )


class FunctionCall(ResponseModel):
    """A function and its arguments, JSON as the model wrote it: check it before you use it."""

    name: str
    arguments: str


class ToolCall(ResponseModel):
    """A call that the model asks for; ``id`` goes into the turn with its result."""

    id: str
    function: FunctionCall


class FunctionCallDelta(ResponseModel):
    """A piece of a call: its name, which comes first and once, or more of its arguments."""

    name: str | None = None
    arguments: Annotated[str, NullIsDefault] = ""


class ToolCallDelta(ResponseModel):
    """A piece of the call number ``index``; the first one has the ``id``."""

    index: int
    id: str | None = None
    function: Annotated[FunctionCallDelta, NullIsDefault] = FunctionCallDelta()


class _ChatMessage(ResponseModel):
    """The ``message`` or ``delta`` of a chat choice; the first delta has the role alone."""

    content: Annotated[str, NullIsDefault] = ""
    reasoning_content: object = None
    tool_calls: object = None


class _Generated(ResponseModel):
    """``reasoning_content`` is what a model that thinks wrote before its answer, None otherwise."""

    index: int
    text: str
    finish_reason: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_chat(cls, fields: object) -> object:
        # The chat endpoint sends these as `message` (whole) or `delta` (streamed).
        if isinstance(fields, Mapping):
            for key in ("message", "delta"):
                if key in fields:
                    message = _ChatMessage.model_validate(fields[key])
                    return {
                        **fields,
                        "text": message.content,
                        "reasoning_content": message.reasoning_content,
                        "tool_calls": message.tool_calls,
                    }
        return fields


class Choice(_Generated):
    """One generated text. ``finish_reason`` is ``stop``, ``length`` or ``tool_calls``."""

    tool_calls: Annotated[tuple[ToolCall, ...], Field(strict=False), NullIsDefault] = ()
    logprobs: Mapping[str, object] | None = None

    @property
    def message(self) -> dict[str, object]:
        """The turn of the assistant, to be sent with the next request. Without its reasoning."""
        turn: dict[str, object] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            calls = [{"type": "function", **call.model_dump()} for call in self.tool_calls]
            turn |= {"content": self.text or None, "tool_calls": calls}
        return turn


class CompletionChunk(_Generated):
    """A piece of a streamed generation; only the last one has ``usage``.

    The server uses "chunk" for a piece of a prompt in a prefill.
    """

    tool_calls: Annotated[tuple[ToolCallDelta, ...], Field(strict=False), NullIsDefault] = ()
    usage: Usage | None = None


def _by_index(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    return tuple(sorted(choices, key=lambda choice: choice.index))


class Completion(ResponseModel):
    """A finished generation of either endpoint; the content of a chat message is its ``text``.
    ``warnings`` say what was likely not meant."""

    id: str
    model: str
    choices: Annotated[tuple[Choice, ...], Field(min_length=1), AfterValidator(_by_index)]
    usage: Usage | None = None
    prefix: PrefixUsed | None = None
    warnings: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text
