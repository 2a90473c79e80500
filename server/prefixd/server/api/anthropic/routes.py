"""POST /v1/messages: conversations in the shape of Anthropic's Messages API."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from prefixd.server.api.anthropic.answers import MessageAnswer
from prefixd.server.api.anthropic.requests import NAMES, WORDS, CountRequest, MessagesRequest
from prefixd.server.api.anthropic.schemas import MessageObject, TokenCount
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.dependencies import Generator
from prefixd.server.api.generate.ensembles import refuse_ensemble
from prefixd.server.api.generate.renaming import in_names
from prefixd.server.api.generate.responding import respond
from prefixd.server.api.generate.service import service_of
from prefixd.server.api.generate.tool_plan import plan_tools
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.api.metrics import Endpoint
from prefixd.server.api.values import Flag

router = APIRouter(prefix="/v1", tags=["messages"])
count_router = APIRouter(prefix="/v1", tags=["messages"], route_class=CatalogRoute)

Beta = Annotated[Flag | None, Query(description="Ignored: clients send it with beta features.")]

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The message, or with `stream` its events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(
    "/messages",
    response_model=MessageObject,
    responses=_RESPONSES,
    openapi_extra=json_request(MessagesRequest),
)
async def create_message(
    request: Request,
    principal: Generator,
    body: Annotated[MessagesRequest, Depends(json_body(MessagesRequest))],
    beta: Beta = None,
) -> Response:
    """Answer a conversation with the base model or a prefix; `stream` for events."""
    del beta
    service = service_of(request)
    body = with_user(body.for_user(), request, service.user_header)
    with in_names(NAMES, WORDS):
        chat = body.chat(reasons=service.served.chat.reasons)
        return await respond(
            service,
            request,
            principal,
            admit=partial(service.admission.chat, principal, chat, id_head="msg_"),
            answer=MessageAnswer,
            endpoint=Endpoint.MESSAGES,
            stream=bool(body.stream),
            is_quick=service.admission.resolver.is_base(body.model, body.user, body.prefix),
        )


@count_router.post(
    "/messages/count_tokens",
    response_model=TokenCount,
    openapi_extra=json_request(CountRequest),
)
def count_tokens(
    request: Request,
    principal: Generator,
    body: Annotated[CountRequest, Depends(json_body(CountRequest))],
    beta: Beta = None,
) -> TokenCount:
    """The number of tokens that the prompt of a message has."""
    del beta
    service = service_of(request)
    body = with_user(body, request, service.user_header)
    with in_names(NAMES, WORDS):
        chat = body.chat(reasons=service.served.chat.reasons)
        resolver, builder = service.admission.resolver, service.admission.prompts
        prefix = resolver.resolve(principal.tenant, body.model, body.user, body.prefix)
        refuse_ensemble(prefix, what="to count under, since each member has a prompt of its own")
        [prompt] = builder.chat(chat, prefix, plan_tools(chat, builder.traits(prefix))).tokens
    return TokenCount(input_tokens=prompt.num_tokens)
