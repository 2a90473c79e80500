"""POST /v1/completions and POST /v1/chat/completions: admit, run, respond at once or stream."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.dependencies import Generator
from prefixd.server.api.generate.answer_options import answer_options
from prefixd.server.api.generate.choices import choices_answer
from prefixd.server.api.generate.formatter import (
    ChatAnswer,
    ChatFormatter,
    CompletionAnswer,
    CompletionFormatter,
    ResponseFormatter,
)
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.generate.responding import respond
from prefixd.server.api.generate.service import GenerationService, service_of
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.tenants.principal import Principal

router = APIRouter(prefix="/v1", tags=["generation"])


async def _respond(
    service: GenerationService,
    request: Request,
    principal: Principal,
    body: CompletionRequest | ChatRequest,
    *,
    admit: Callable[[], Admitted],
    formatter: ResponseFormatter,
) -> Response:
    """Admit with ``admit``, run on the engine, and format the result."""
    return await respond(
        service,
        request,
        principal,
        admit=admit,
        answer=partial(choices_answer, service, body, formatter),
        endpoint=formatter.endpoint,
        stream=bool(body.stream),
        is_quick=service.admission.resolver.is_base(body.model, body.user, body.prefix),
        embedding_bytes=body.num_embedding_bytes,
    )


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response, or with `stream` the events `data: {chunk}`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(
    "/completions",
    response_model=CompletionAnswer,
    responses=_RESPONSES,
    openapi_extra=json_request(CompletionRequest),
)
async def create_completion(
    request: Request,
    principal: Generator,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Response:
    """Continue one or more prompts with the base model or a prefix; `stream` for events."""
    generation = service_of(request)
    body = with_user(body, request, generation.user_header)
    admit = partial(generation.admission.completion, principal, body)
    options = answer_options(body, generation.served, top_logprobs=body.logprobs)
    formatter = CompletionFormatter(generation.served.tokenizer, options)
    return await _respond(generation, request, principal, body, admit=admit, formatter=formatter)


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    responses=_RESPONSES,
    openapi_extra=json_request(ChatRequest),
)
async def create_chat_completion(
    request: Request,
    principal: Generator,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
) -> Response:
    """Answer a conversation with the base model or a prefix; `stream` for events."""
    generation = service_of(request)
    body = with_user(body, request, generation.user_header)
    admit = partial(generation.admission.chat, principal, body)
    options = answer_options(body, generation.served, top_logprobs=body.num_top_logprobs)
    formatter = ChatFormatter(generation.served.tokenizer, options)
    return await _respond(generation, request, principal, body, admit=admit, formatter=formatter)
