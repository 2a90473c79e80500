"""POST /v1/responses: OpenAI's newer shape of a conversation, without anything stored."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.dependencies import Generator
from prefixd.server.api.generate.renaming import in_names
from prefixd.server.api.generate.responding import respond
from prefixd.server.api.generate.service import service_of
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.api.metrics import Endpoint
from prefixd.server.api.responses.answers import ResponseAnswer
from prefixd.server.api.responses.requests import NAMES, WORDS, ResponsesRequest
from prefixd.server.api.responses.schemas import ResponseObject

router = APIRouter(prefix="/v1", tags=["generation"])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response, or with `stream` its events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(
    "/responses",
    response_model=ResponseObject,
    responses=_RESPONSES,
    openapi_extra=json_request(ResponsesRequest),
)
async def create_response(
    request: Request,
    principal: Generator,
    body: Annotated[ResponsesRequest, Depends(json_body(ResponsesRequest))],
) -> Response:
    """Answer a text or a conversation of items; nothing is stored; `stream` for events."""
    service = service_of(request)
    body = with_user(body, request, service.user_header)
    with in_names(NAMES, WORDS):
        chat = body.chat()
        return await respond(
            service,
            request,
            principal,
            admit=partial(service.admission.chat, principal, chat, id_head="resp_"),
            answer=partial(ResponseAnswer, service.served.tokenizer, body),
            endpoint=Endpoint.RESPONSES,
            stream=bool(body.stream),
            is_quick=service.admission.resolver.is_base(body.model, body.user, body.prefix),
        )
