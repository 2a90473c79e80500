"""Body of POST /v1/responses, and the chat that it stands for."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.conversation import Effort
from prefixd.server.api.generate.fields import RequestFields, Stop, misplaced
from prefixd.server.api.generate.renaming import chat_of
from prefixd.server.api.generate.requests import ChatRequest
from prefixd.server.api.generate.shapes import refusal, unexpected
from prefixd.server.api.generate.structure import JsonSchemaFormat, StructuredOutputs
from prefixd.server.api.generate.tools.fields import MAX_TOOLS, FunctionDefinition
from prefixd.server.api.responses.items import Input, turns_of

LOGPROBS = "message.output_text.logprobs"

NAMES = {
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.function": "tool_choice",
    r"response_format\.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
}
"""Places of a chat, as of ``renaming``."""

WORDS = {"response_format": "'text.format'"}

Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _refuse_types(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise refusal(
                "expected tools of type 'function'; tools that the server would run are not "
                "supported, and neither are custom ones",
                at=("type",),
                kind="unsupported_at",
            )
        return data


class NamedFunction(StrictModel):
    """The function that must be called."""

    type: Literal["function"]
    name: str


_CHOICES = ("none", "auto", "required")


def _check_choice(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    del validate
    if isinstance(value, NamedFunction) or (isinstance(value, str) and value in _CHOICES):
        return value
    if isinstance(value, dict):
        if isinstance(kind := value.get("type"), str) and kind != "function":
            raise refusal(
                "expected another choice; those of other types than 'function' are not supported",
                kind="unsupported_at",
            )
        return NamedFunction.model_validate(value)
    offered = "'none', 'auto', 'required' or {\"type\": \"function\", \"name\": …}"
    raise unexpected(offered, value, kind="unexpected_word")


Choice = Annotated[
    Literal["none", "auto", "required"] | NamedFunction, WrapValidator(_check_choice)
]


class PlainFormat(StrictModel):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchemaFormat):
    """A JSON Schema that the answer must match."""

    type: Literal["json_schema"]


def _check_format(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    del validate
    if isinstance(value, PlainFormat | SchemaFormat):
        return value
    is_schema = isinstance(value, dict) and value.get("type") == "json_schema"
    if not isinstance(value, dict) or is_schema:
        return SchemaFormat.model_validate(value)
    kinds = ("text", "json_object", "json_schema")
    if value.get("type") not in kinds:
        words = "'text', 'json_object' or 'json_schema'"
        raise unexpected(words, value.get("type"), at=("type",), kind="unexpected_word")
    return PlainFormat.model_validate(value)


class TextConfig(StrictModel):
    """What the text of the answer must be."""

    format: Annotated[PlainFormat | SchemaFormat, WrapValidator(_check_format)] | None = None
    verbosity: Literal["medium"] | None = Field(
        default=None, description="Others are not supported."
    )


class Reasoning(StrictModel):
    """How much the model thinks."""

    effort: Effort | None = Field(
        default=None, description="`none` sets `enable_thinking` of the chat template to false."
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Ignored: reasoning is shown in full."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Ignored."
    )


class ResponseStreamOptions(StrictModel):
    """Options of a stream."""

    include_obfuscation: bool | None = Field(default=None, description="Ignored.")


MetadataText = Annotated[str, Field(max_length=512)]


class ResponsesRequest(RequestFields):
    """Body of POST /v1/responses."""

    NEUTRAL = {  # noqa: RUF012 - a ClassVar in the base
        "background": (None, False),
        "context_management": (None, []),
        "conversation": (None,),
        "moderation": (None,),
        "previous_response_id": (None,),
        "prompt": (None,),
        "prompt_cache_options": (None,),
        "store": (None, False),
        "truncation": (None, "disabled"),
    }

    input: Input = Field(description="A text of the user, or the items of the conversation.")
    instructions: str | None = Field(
        default=None, description="Stands in front of the conversation, as a system message."
    )
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = Field(
        default=None, ge=1, description="Ignored: it limits tools that the server would run."
    )
    tools: list[FunctionTool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: Choice | None = Field(
        default=None,
        description="`none`: call none; `auto`, the default with tools: call some or answer; "
        "`required`: call at least one; or the one to call.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="With false, at most one call. Default: true."
    )
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description=f"With `{LOGPROBS}` in `include`."
    )
    include: list[Included] | None = Field(
        default=None,
        max_length=16,
        description=f"`{LOGPROBS}`: the log-probabilities of the text. Others are ignored.",
    )
    metadata: (
        Annotated[dict[Annotated[str, Field(max_length=64)], MetadataText], Field(max_length=16)]
        | None
    ) = Field(default=None, description="Returned with the response.")
    stream_options: ResponseStreamOptions | None = None

    stop: Stop | None = Field(
        default=None,
        description="Text, or up to 16 texts, that end the output and are not part of it.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="As of vLLM. Not together with `text.format`."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        max_length=64,
        description="Variables of the model's chat template, such as `enable_thinking`.",
    )
    include_reasoning: bool | None = Field(
        default=None, description="With false, reasoning is left out. Default: true."
    )

    service_tier: str | None = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored.")
    prompt_cache_retention: str | None = Field(default=None, description="Ignored.")

    @model_validator(mode="after")
    def _check_options(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise misplaced("stream_options", "'stream': true")
        if self.top_logprobs and not self.wants_logprobs:
            raise misplaced("top_logprobs", f"'{LOGPROBS}' in 'include'")
        if not self.input and not self.instructions:
            raise PydanticCustomError(
                "named",
                "'{name}': expected a text or items; received an empty text",
                {"name": "input"},
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return LOGPROBS in (self.include or ())

    def chat(self) -> ChatRequest:
        """The same request as a chat. Raises BadRequest, with names of a chat."""
        own = set(ResponsesRequest.model_fields) - set(RequestFields.model_fields)
        fields = self.model_dump(exclude=own, exclude_none=True)
        turns = turns_of(self.input)
        if self.instructions:
            turns = [{"role": "system", "content": self.instructions}, *turns]
        fields |= {
            "messages": turns,
            "max_tokens": self.max_output_tokens,
            "tools": self._tools(),
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
            "stop": self.stop,
            "structured_outputs": self.structured_outputs,
            "chat_template_kwargs": self.chat_template_kwargs,
            "include_reasoning": self.include_reasoning,
        }
        return chat_of(fields)

    def _tools(self) -> list[dict[str, Any]] | None:
        if self.tools is None:
            return None
        return [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools
        ]

    def _tool_choice(self) -> str | dict[str, Any] | None:
        if isinstance(self.tool_choice, NamedFunction):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _format(self) -> dict[str, Any] | None:
        asked = None if self.text is None else self.text.format
        if isinstance(asked, SchemaFormat):
            schema = asked.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            return {"type": "json_schema", "json_schema": schema}
        return None if asked is None else {"type": asked.type}
