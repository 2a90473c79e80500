"""The response of POST /v1/responses, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import BaseModel

from prefixd.server.api.generate.formatter import ChatTokenLogprob, PrefixUsed


class OutputText(BaseModel):
    """The text of a message. ``logprobs`` is empty where none were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatTokenLogprob]


class OutputMessage(BaseModel):
    """Text for the reader."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class ReasoningText(BaseModel):
    """Text that the model wrote before it answered."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    """What the model thought."""

    id: str
    type: Literal["reasoning"]
    status: Literal["completed", "incomplete"]
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(BaseModel):
    """A call of a function; ``arguments`` is JSON text, cut where the status is ``incomplete``."""

    id: str
    type: Literal["function_call"]
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(BaseModel):
    """``cached_tokens`` of the prompt were not computed: their KV was shared."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(BaseModel):
    """Tokens of reasoning, with its marks."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts; virtual tokens of a prefix are not among them."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """Why a response failed, in a stream."""

    code: str
    message: str


class ResponseObject(BaseModel):
    """Response of POST /v1/responses: the output, what was asked for, and the prefix that was
    used."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage
    prefix: PrefixUsed | None
    warnings: list[str] | None = None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
