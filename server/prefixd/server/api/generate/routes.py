"""POST /v1/completions and POST /v1/chat/completions: admit, run, respond at once or stream."""

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.responses import Response

from prefixd.server.api.body import declared_bytes, json_body, json_request
from prefixd.server.api.catalog_calls import waited_by
from prefixd.server.api.dependencies import Generator, bounds_of
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import from_queue_full
from prefixd.server.api.generate.admission import Admission
from prefixd.server.api.generate.answer_options import answer_options
from prefixd.server.api.generate.charging import Charging
from prefixd.server.api.generate.constraints import ConstraintLoader
from prefixd.server.api.generate.event_encoder import EventEncoder
from prefixd.server.api.generate.event_stream import EventStream, while_connected
from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.generate.formatter import (
    ChatAnswer,
    ChatFormatter,
    CompletionAnswer,
    CompletionFormatter,
    ResponseFormatter,
)
from prefixd.server.api.generate.generation import Batch, EventDeliveries, Generation
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.generate.prompt_scores import PromptScores
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.api.metrics import Metrics, TenantClass
from prefixd.server.api.request_record import (
    Admitted,
    ClientGone,
    RequestRecord,
    RequestRecorder,
    Tracer,
)
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import FinishEvent, QueueFull, TokenEvent
from prefixd.server.errors import Unavailable
from prefixd.server.tenants.principal import Principal

router = APIRouter(prefix="/v1", tags=["generation"])

log = structlog.get_logger("prefixd")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected first. It is only logged."""

QUICK_BYTES = 2048
"""Bodies up to this size take about a millisecond to admit, and three with 128 prompts: so long may
streams wait."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C trace context."""


@dataclass(frozen=True, slots=True)
class GenerationService:
    """Admits requests and runs them on the engine. One for each application."""

    admission: Admission
    engine: Engine
    charging: Charging
    drain_state: DrainState
    served: ServedModel
    metrics: Metrics
    inputs: InputLoader
    constraints: ConstraintLoader
    trace: Tracer | None = None
    user_header: str | None = None
    deliveries: EventDeliveries = field(default_factory=EventDeliveries)

    async def respond(
        self,
        request: Request,
        principal: Principal,
        body: CompletionRequest | ChatRequest,
        admit: Callable[[], Admitted],
        formatter: ResponseFormatter,
    ) -> Response:
        """Admit with ``admit``, run on the engine, and format the result."""
        recorder = self._recorder(request, principal, formatter, stream=bool(body.stream))
        try:
            # All contexts entered here exit before the response ends, the recorder last.
            async with AsyncExitStack() as running:
                await running.enter_async_context(recorder)
                self._check_ready(principal)
                if body.num_embedding_bytes:
                    held = bounds_of(request).embeddings
                    await running.enter_async_context(
                        held.hold(principal.tenant, body.num_embedding_bytes)
                    )
                admitted, recorder.grant = await self.charging.admit(
                    principal,
                    admit,
                    waited=waited_by(request),
                    is_quick=self._is_quick(request, body),
                )
                recorder.record.admitted = admitted
                admitted = await self.constraints.fill(await self.inputs.fill(admitted))
                generation = Generation(
                    self.engine, admitted, self.drain_state, recorder, self.deliveries.running()
                )
                await running.enter_async_context(generation)
                await running.enter_async_context(while_connected(request.receive))
                headers = _headers(admitted, recorder)
                if formatter.options.token_ids:
                    formatter = replace(formatter, prompts=admitted.prompts)
                events: AsyncIterable[Batch] = generation
                if body.shown_prompt.any:
                    scores = PromptScores(self.served.tokenizer, body.shown_prompt, admitted)
                    events = scores.events(generation)
                    formatter = replace(formatter, prompt_scores=scores)
                kind = formatter.chunk_object if body.stream else formatter.object
                common = (events, recorder.record, formatter, _envelope(admitted, kind))
                if not body.stream:
                    response = await _whole(*common)
                    return JSONResponse(response, 200, headers)
                chunks = _chunks(*common, body)
                await running.enter_async_context(aclosing(chunks))
                # The first chunk decides the status: a request that fails before it is answered
                # with an error and not with a stream.
                first = await anext(chunks)
                return EventStream(
                    first,
                    chunks,
                    running=running.pop_all(),
                    headers=headers,
                    request_id=recorder.record.request_id,
                )
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    def _recorder(
        self, request: Request, principal: Principal, formatter: ResponseFormatter, *, stream: bool
    ) -> RequestRecorder:
        headers = request.headers
        record = RequestRecord(
            endpoint=formatter.endpoint,
            tenant=principal.tenant,
            tenant_class=TenantClass.of(principal.weight),
            served_model=self.served.name,
            request_id=request.state.request_id,
            stream=stream,
            trace_context={name: headers[name] for name in TRACE_HEADERS if name in headers},
        )
        return RequestRecorder(
            record=record,
            metrics=self.metrics,
            limiter=self.charging.limiter,
            settlements=self.charging.catalog.settlements,
            trace=self.trace,
        )

    def _is_quick(self, request: Request, body: GenerationFields) -> bool:
        """Whether admission neither asks the catalog nor computes for long."""
        # The length of a chunked body is not declared.
        return 0 < declared_bytes(request) <= QUICK_BYTES and self.admission.resolver.is_base(
            body.model, body.user
        )

    def _check_ready(self, principal: Principal) -> None:
        """Raise Unavailable, before any work, for a request that the engine would not take."""
        if self.drain_state.closed:
            raise self.drain_state.refusal()
        trouble = self.engine.trouble
        if trouble is not None:
            raise Unavailable(trouble, retry_after=1)
        try:
            self.engine.check_room(principal.tenant, weight=principal.weight)
        except QueueFull as full:
            raise from_queue_full(full, self.drain_state) from full


def _headers(admitted: Admitted, recorder: RequestRecorder) -> dict[str, str]:
    """The remaining rate limits and the prefix that is used, for clients that read no bodies."""
    headers = dict(recorder.grant.headers) if recorder.grant else {}
    if admitted.prefix is not None:
        manifest = admitted.prefix.manifest
        headers["x-prefixd-prefix"] = f"{manifest.name}@{manifest.version}"
        headers["x-prefixd-prefix-digest"] = manifest.digest
        headers["x-prefixd-prefix-chosen-by"] = admitted.prefix.chosen_by
    return headers


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
        head = record.admitted.head | formatter.head()
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


def _envelope(admitted: Admitted, kind: str) -> dict[str, Any]:
    """The fields of a response other than its choices."""
    prefix, used = admitted.prefix, None
    if prefix is not None:
        manifest = prefix.manifest
        used = {
            "name": manifest.name,
            "version": manifest.version,
            "digest": manifest.digest,
            "chosen_by": prefix.chosen_by,
            "recipe_revision": manifest.recipe_revision,
        }
    return {
        "id": admitted.id,
        "object": kind,
        "created": int(time.time()),
        "model": admitted.model,
        "prefix": used,
    }


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response, or with `stream` the events `data: {chunk}`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _service(request: Request) -> GenerationService:
    # Not a dependency: FastAPI would solve one more for each request.
    service: GenerationService = request.app.state.generation
    return service


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
    generation = _service(request)
    body = with_user(body, request, generation.user_header)
    admit = partial(generation.admission.completion, principal, body)
    options = answer_options(body, generation.served, top_logprobs=body.logprobs)
    formatter = CompletionFormatter(generation.served.tokenizer, options)
    return await generation.respond(request, principal, body, admit, formatter)


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
    generation = _service(request)
    body = with_user(body, request, generation.user_header)
    admit = partial(generation.admission.chat, principal, body)
    options = answer_options(body, generation.served, top_logprobs=body.num_top_logprobs)
    formatter = ChatFormatter(generation.served.tokenizer, options)
    return await generation.respond(request, principal, body, admit, formatter)
