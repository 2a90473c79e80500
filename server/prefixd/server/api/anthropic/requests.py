"""Bodies of POST /v1/messages and of counting its tokens, and the chats that they stand for."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from prefixd.server.api.anthropic.content import CacheControl, Message, Texts, text_of, turns_of
from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.compositions import ComposedPrefix
from prefixd.server.api.generate.fields import NonEmpty, RequestFields
from prefixd.server.api.generate.renaming import chat_of
from prefixd.server.api.generate.requests import ChatRequest
from prefixd.server.api.generate.shapes import refusal, shape_by
from prefixd.server.api.generate.structure import StructuredOutputs
from prefixd.server.api.generate.tools.fields import (
    MAX_TOOLS,
    FunctionName,
    Parameters,
)
from prefixd.server.api.values import User
from prefixd.server.errors import BadRequest

NAMES = {
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.function": "tool_choice",
    r"response_format\.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "thinking",
    "stop": "stop_sequences",
    "continue_final_message": "messages",
    "prompt": "messages",
}
"""Places of a chat, as of ``renaming``."""

WORDS = {
    "required": '{"type": "any"}',
    "auto": '{"type": "auto"}',
    "none": '{"type": "none"}',
    "response_format": "'output_config.format'",
}


class MessageTool(StrictModel):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: Parameters = Field(description="A JSON Schema of type `object`.")
    cache_control: CacheControl | None = Field(default=None, description="Ignored.")
    strict: bool | None = Field(
        default=None, description="Ignored: constrained calls always match the schema."
    )
    eager_input_streaming: bool | None = Field(default=None, description="Ignored.")
    input_examples: list[dict[str, Any]] | None = Field(default=None, description="Ignored.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_types(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise refusal(
                "expected tools of type 'custom', which the client runs; others are not supported",
                at=("type",),
                kind="unsupported_at",
            )
        return data


class _Choice(StrictModel):
    disable_parallel_tool_use: bool | None = Field(
        default=None, description="With true, at most one call."
    )


class AutoChoice(_Choice):
    """Call some tools or answer."""

    type: Literal["auto"]


class AnyChoice(_Choice):
    """Call at least one tool."""

    type: Literal["any"]


class ToolChoice(_Choice):
    """Call this tool."""

    type: Literal["tool"]
    name: str


class NoneChoice(_Choice):
    """Call no tool."""

    type: Literal["none"]


Choice = Annotated[
    AutoChoice | AnyChoice | ToolChoice | NoneChoice,
    shape_by(
        "type", {"auto": AutoChoice, "any": AnyChoice, "tool": ToolChoice, "none": NoneChoice}
    ),
]


class Thinking(StrictModel):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(
        default=None, ge=1, description="Ignored: `max_tokens` limits thinking and text together."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="`omitted`: thinking is left out."
    )


class OutputFormat(StrictModel):
    """A JSON Schema that the text must match."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(
        alias="schema", description="docs/structured_output.md has the keywords."
    )


class OutputConfig(StrictModel):
    """What the output must be."""

    format: OutputFormat | None = None
    effort: Literal["high"] | None = Field(default=None, description="Others are not supported.")


def _in_place(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A refusal of a user at the place where it was named."""
    try:
        return validate(value)
    except BadRequest as error:
        raise refusal(error.message) from None


class Metadata(StrictModel):
    """The caller's end user."""

    user_id: Annotated[User, WrapValidator(_in_place)] | None = Field(
        default=None, description="Your end user, as `user`."
    )


class Conversation(StrictModel):
    """What is said, and how the model may answer."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=4096,
        description="Where the last one is the assistant's, its text is continued.",
    )
    system: Texts | None = None
    tools: list[MessageTool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: Choice | None = Field(
        default=None,
        description="`auto`, the default with tools: call some or answer; `any`: call at least "
        "one; `tool`: call the one with this `name`; `none`: call none.",
    )
    thinking: Thinking | None = Field(
        default=None,
        description="`enabled` and `adaptive` set `enable_thinking` of the chat template to true; "
        "without, it is false.",
    )
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(default=None, description="Ignored.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        max_length=64,
        description="Variables of the model's chat template, such as `enable_thinking`.",
    )

    def chat_fields(self, *, reasons: bool) -> dict[str, Any]:
        """Fields of a chat; None stands for one that is left out. ``reasons``: the model may
        think. Raises BadRequest, with names of a chat."""
        turns, choice = turns_of(self.messages), self.tool_choice
        if not turns:
            raise BadRequest(
                "'messages': expected a message with a text or blocks; all that were received are "
                "empty",
                param="messages",
            )
        continues = turns[-1]["role"] == "assistant"
        if continues:
            _check_continued(turns[-1])
        if self.system:
            turns = [{"role": "system", "content": text_of(self.system)}, *turns]
        once = choice is not None and choice.disable_parallel_tool_use
        return {
            "messages": turns,
            "continue_final_message": continues or None,
            "tools": [_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": None if choice is None else _choice(choice),
            "parallel_tool_calls": False if once else None,
            "response_format": self._format(),
            **self._thinking(reasons=reasons),
        }

    def _format(self) -> dict[str, Any] | None:
        asked = None if self.output_config is None else self.output_config.format
        if asked is None:
            return None
        schema = {"name": "output", "schema": asked.schema_}
        return {"type": "json_schema", "json_schema": schema}

    def _thinking(self, *, reasons: bool) -> dict[str, Any]:
        asked, variables = self.thinking, self.chat_template_kwargs
        thinks = asked is not None and asked.type != "disabled"
        if not reasons:
            if asked is not None and asked.type == "enabled":
                raise BadRequest(
                    "'thinking': the served model does not think before it answers: leave it out, "
                    'or send {"type": "adaptive"} or {"type": "disabled"}',
                    code="unsupported_field",
                    param="thinking",
                )
            return {"chat_template_kwargs": variables}
        return {
            "chat_template_kwargs": {"enable_thinking": thinks, **(variables or {})},
            "include_reasoning": asked is not None and thinks and asked.display != "omitted",
        }


class CountRequest(Conversation):
    """Body of POST /v1/messages/count_tokens."""

    model: str = Field(min_length=1, max_length=512, description="As of a message.")
    user: User | None = Field(default=None, description="As of a message.")
    prefix: ComposedPrefix | None = Field(default=None, description="As of a message.")

    def chat(self, *, reasons: bool) -> ChatRequest:
        """The same conversation as a chat. Raises BadRequest, with names of a chat."""
        fields = self.chat_fields(reasons=reasons)
        return chat_of({"model": self.model, "user": self.user, **fields})


class MessagesRequest(Conversation, RequestFields):
    """Body of POST /v1/messages."""

    NEUTRAL = {  # noqa: RUF012 - a ClassVar in the base
        "container": (None,),
        "context_management": (None,),
        "diagnostics": (None,),
        "inference_geo": (None,),
        "mcp_servers": (None, []),
        "speed": (None, "standard"),
    }

    max_tokens: int = Field(ge=1)
    stop_sequences: list[NonEmpty] | None = Field(
        default=None,
        max_length=16,
        description="Texts that end the output and are not part of it.",
    )
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(
        default=None, description="Ignored."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="As of vLLM. Not together with `output_config.format`."
    )

    @model_validator(mode="after")
    def _check_user(self) -> "MessagesRequest":
        named = self.metadata and self.metadata.user_id
        if named is not None and self.user not in (None, named):
            raise refusal(
                "expected the same as 'user', or one of the two; received another",
                at=("metadata", "user_id"),
            )
        return self

    def for_user(self) -> "MessagesRequest":
        """The request with the user of its metadata."""
        named = self.metadata and self.metadata.user_id
        return self if named is None else self.model_copy(update={"user": named})

    def chat(self, *, reasons: bool) -> ChatRequest:
        """The same request as a chat. Raises BadRequest, with names of a chat."""
        own = set(MessagesRequest.model_fields) - set(RequestFields.model_fields)
        return chat_of(
            {
                **self.model_dump(exclude=own, exclude_none=True),
                **self.chat_fields(reasons=reasons),
                "max_tokens": self.max_tokens,
                "stop": self.stop_sequences or None,
                "structured_outputs": self.structured_outputs,
            }
        )


def _choice(choice: AutoChoice | AnyChoice | ToolChoice | NoneChoice) -> str | dict[str, Any]:
    if isinstance(choice, ToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if isinstance(choice, AnyChoice) else choice.type


def _tool(tool: MessageTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _check_continued(turn: dict[str, Any]) -> None:
    if "tool_calls" in turn or not turn.get("content"):
        raise BadRequest(
            "'messages': expected a last message of the user, or text of the assistant to "
            "continue; received one of the assistant without text, or with calls",
            param="messages",
        )
