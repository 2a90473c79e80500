"""The generating part of the protocol: completions and chats, whole and streamed."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, Unpack

from prefixd.client.types import Completion
from prefixd.client.wire import Call, Repeat, Request, Response, StreamCall, parse_body, request_of

Message = Mapping[str, object]
"""One turn of a conversation, as in the OpenAI API."""


class FunctionName(TypedDict):
    """Which function."""

    name: str


class NamedTool(TypedDict):
    """The value of ``tool_choice`` that demands a call of one function."""

    type: Literal["function"]
    function: FunctionName


class Sampling(TypedDict, total=False):
    """How the next token is chosen and when to stop; names as in the OpenAI API and vLLM.

    ``priority`` orders the tenant's own requests, the lowest first; after ``timeout`` seconds the
    server aborts the request (``DeadlineError``); ``kv_reuse`` False shares no KV with other
    requests; ``speculate`` False computes one token at a time, also where the server speculates.
    ``apply_recipe`` and ``echo`` are of completions alone. ``prefix`` composes several prefixes:
    ``{"stack": [...]}``, ``{"blend": {...}}`` or ``{"ensemble": [...]}``, with the base as model.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    n: int
    user: str
    prefix: Mapping[str, object]
    priority: int
    timeout: float
    kv_reuse: bool
    speculate: bool
    apply_recipe: bool
    echo: bool
    logprobs: int | bool
    top_logprobs: int
    response_format: Mapping[str, object]
    structured_outputs: Mapping[str, object]
    tools: Sequence[Mapping[str, object]]
    tool_choice: Literal["auto", "none", "required"] | NamedTool
    parallel_tool_calls: bool
    include_reasoning: bool
    reasoning_effort: str
    chat_template_kwargs: Mapping[str, object]


def complete(
    prompt: str | Sequence[int], *, model: str, **sampling: Unpack[Sampling]
) -> Call[Completion]:
    """Continue a prompt (text or token ids) under a prefix reference or the bare base."""
    return Call(_completions({"model": model, "prompt": prompt}, sampling), _completion)


def chat(
    messages: Sequence[Message], *, model: str, **sampling: Unpack[Sampling]
) -> Call[Completion]:
    """Answer a conversation under a prefix reference or the bare base."""
    return Call(_chats({"model": model, "messages": list(messages)}, sampling), _completion)


def stream_complete(
    prompt: str | Sequence[int], *, model: str, **sampling: Unpack[Sampling]
) -> StreamCall:
    """Like ``complete``, a chunk at a time."""
    return StreamCall(_completions({"model": model, "prompt": prompt, **_STREAMED}, sampling))


def stream_chat(
    messages: Sequence[Message], *, model: str, **sampling: Unpack[Sampling]
) -> StreamCall:
    """Like ``chat``, a chunk at a time."""
    fields = {"model": model, "messages": list(messages), **_STREAMED}
    return StreamCall(_chats(fields, sampling))


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def _completions(fields: Mapping[str, object], sampling: Sampling) -> Request:
    return _generation(fields, sampling, "completions")


def _chats(fields: Mapping[str, object], sampling: Sampling) -> Request:
    return _generation(fields, sampling, "chat", "completions")


def _generation(fields: Mapping[str, object], sampling: Sampling, *path: str) -> Request:
    """The request. Fields that ``Sampling`` does not list are sent too: the server refuses those
    that it does not know. TypeError for those that the method itself decides."""
    for name in _STREAMED.keys() & sampling.keys():
        raise TypeError(
            f"unexpected keyword argument {name!r}: expected stream_complete or stream_chat for a "
            "stream, complete or chat for a whole answer"
        )
    body = {**fields, **sampling}
    return request_of("POST", "v1", *path, json=body, repeat=Repeat.UNANSWERED)


def _completion(response: Response) -> Completion:
    completion = parse_body(Completion, response)
    return completion.model_copy(update={"request_id": response.headers.get("x-request-id")})
