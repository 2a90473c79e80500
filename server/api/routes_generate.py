"""POST /v1/completions and POST /v1/chat/completions."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.answers import ChatAnswer, ChatDialect, CompletionAnswer, CompletionsDialect
from server.api.auth import Generator
from server.api.body import json_body, json_request
from server.api.generate import door_of, respond
from server.api.sampling import ChatRequest, CompletionRequest
from server.api.services import ServicesDep

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post(
    "/completions",
    response_model=CompletionAnswer,
    openapi_extra=json_request(CompletionRequest),
)
async def create_completion(
    request: Request,
    services: ServicesDep,
    principal: Generator,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Response:
    """Continue one or more prompts with the base model or a prefix; `stream` for events."""
    return await respond(
        request,
        services=services,
        principal=principal,
        body=body,
        admit=partial(door_of(services, principal).completion, principal.tenant, body),
        dialect=CompletionsDialect(services.served.tokenizer, body.logprobs),
    )


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    openapi_extra=json_request(ChatRequest),
)
async def create_chat_completion(
    request: Request,
    services: ServicesDep,
    principal: Generator,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
) -> Response:
    """Answer a conversation with the base model or a prefix; `stream` for events."""
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await respond(
        request,
        services=services,
        principal=principal,
        body=body,
        admit=partial(door_of(services, principal).chat, principal.tenant, body),
        dialect=ChatDialect(services.served.tokenizer, top_logprobs),
    )
