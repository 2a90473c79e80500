"""POST /v1/completions and POST /v1/chat/completions: admit, run, respond at once or stream."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.responses import Response

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.dependencies import Generator
from prefixd.server.api.generate.answer_options import answer_options
from prefixd.server.api.generate.event_encoder import EventEncoder
from prefixd.server.api.generate.event_stream import EventStream
from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.generate.formatter import (
    ChatAnswer,
    ChatFormatter,
    CompletionAnswer,
    CompletionFormatter,
    ResponseFormatter,
)
from prefixd.server.api.generate.generation import Batch
from prefixd.server.api.generate.parsed_formatter import parsing
from prefixd.server.api.generate.prompt_scores import PromptScores
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.generate.service import (
    CLIENT_CLOSED_REQUEST,
    GenerationService,
    envelope,
    service_of,
)
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.api.request_record import ClientGone, RequestRecord
from prefixd.server.engine.request import FinishEvent, TokenEvent
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
    is_base = service.admission.resolver.is_base(body.model, body.user)
    try:
        async with AsyncExitStack() as contexts:
            running = await contexts.enter_async_context(
                service.running(
                    request,
                    principal,
                    admit,
                    endpoint=formatter.endpoint,
                    stream=bool(body.stream),
                    is_quick=is_base,
                    embedding_bytes=body.num_embedding_bytes,
                )
            )
            admitted = running.admitted
            events: AsyncIterable[Batch] = running.generation
            if formatter.options.token_ids:
                formatter = replace(formatter, prompts=admitted.prompts)
            if body.shown_prompt.any:
                scores = PromptScores(service.served.tokenizer, body.shown_prompt, admitted)
                events = scores.events(events)
                formatter = replace(formatter, prompt_scores=scores)
            formatter = parsing(formatter, admitted.syntax)
            kind = formatter.chunk_object if body.stream else formatter.object
            common = (events, running.record, formatter, envelope(admitted, kind))
            if not body.stream:
                response = await _whole(*common)
                return JSONResponse(response, 200, running.headers)
            chunks = _chunks(*common, body)
            await contexts.enter_async_context(aclosing(chunks))
            # The first chunk decides the status: a request that fails before it is answered
            # with an error and not with a stream.
            first = await anext(chunks)
            return EventStream(
                first,
                chunks,
                running=contexts.pop_all(),
                headers=running.headers,
                request_id=running.record.request_id,
            )
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _whole(
    events: AsyncIterable[Batch],
    record: RequestRecord,
    formatter: ResponseFormatter,
    envelope: dict[str, Any],
) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    tokens: defaultdict[int, list[TokenEvent]] = defaultdict(list)
    ends: dict[int, FinishEvent] = {}
    async for batch in events:
        for choice, event in batch:
            if isinstance(event, FinishEvent):
                ends[choice] = event
            elif isinstance(event, TokenEvent):
                tokens[choice].append(event)

    def answer() -> dict[str, Any]:
        choices = [formatter.whole(choice, tokens[choice], ends[choice]) for choice in sorted(ends)]
        assert record.admitted is not None
        head = {**record.admitted.head, **formatter.whole_nulls, **formatter.head()}
        return {**envelope, "choices": choices, "usage": record.usage(), **head}

    # The scores of a long prompt take long to write.
    return answer() if formatter.prompt_scores is None else await run_in_threadpool(answer)


async def _chunks(
    events: AsyncIterable[Batch],
    record: RequestRecord,
    formatter: ResponseFormatter,
    envelope: dict[str, Any],
    body: GenerationFields,
) -> AsyncGenerator[bytes]:
    """The events of a stream; those that are ready at once are yielded together. An error before
    the first of them is raised."""
    admitted = record.admitted
    assert admitted is not None
    encoder = EventEncoder(
        formatter,
        envelope,
        head=admitted.head,
        wants_usage=body.wants_usage,
        prompt_tokens=admitted.choice_lengths if body.wants_each_usage else (),
    )
    openings = encoder.openings(admitted.num_choices)
    async for batch in events:
        if formatter.prompt_scores is None:
            encoded = openings + encoder.batch(batch)
        else:
            encoded = openings + await run_in_threadpool(encoder.batch, batch)
        openings = b""
        if encoded:
            yield encoded
    if body.wants_usage:
        yield encoder.usage(record.usage())


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
