"""POST /v1/completions and POST /v1/chat/completions."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from prefixd.server.api.auth import Generator
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.generate.formatter import (
    ChatAnswer,
    ChatFormatter,
    CompletionAnswer,
    CompletionFormatter,
)
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.generate.respond import GenerationService
from prefixd.server.api.parts import part

router = APIRouter(prefix="/v1", tags=["generation"])

GenerationDep = Annotated[GenerationService, part("generation")]


@router.post(
    "/completions",
    response_model=CompletionAnswer,
    openapi_extra=json_request(CompletionRequest),
)
async def create_completion(
    request: Request,
    generation: GenerationDep,
    principal: Generator,
    body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))],
) -> Response:
    """Continue one or more prompts with the base model or a prefix; `stream` for events."""
    return await generation.respond(
        request,
        principal,
        body,
        admit=partial(generation.admission.completion, principal, body),
        formatter=CompletionFormatter(generation.served.tokenizer, body.logprobs),
    )


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    openapi_extra=json_request(ChatRequest),
)
async def create_chat_completion(
    request: Request,
    generation: GenerationDep,
    principal: Generator,
    body: Annotated[ChatRequest, Depends(json_body(ChatRequest))],
) -> Response:
    """Answer a conversation with the base model or a prefix; `stream` for events."""
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await generation.respond(
        request,
        principal,
        body,
        admit=partial(generation.admission.chat, principal, body),
        formatter=ChatFormatter(generation.served.tokenizer, top_logprobs),
    )
