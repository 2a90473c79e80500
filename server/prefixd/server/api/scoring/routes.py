"""POST /v1/loglikelihood: how likely each of several texts is after a prompt."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.dependencies import Generator
from prefixd.server.api.generate.service import CLIENT_CLOSED_REQUEST, envelope, service_of
from prefixd.server.api.generate.user_header import with_user
from prefixd.server.api.metrics import Endpoint
from prefixd.server.api.request_record import ClientGone
from prefixd.server.api.scoring.admission import ScoringAdmission
from prefixd.server.api.scoring.answers import LoglikelihoodAnswer, scored_choices
from prefixd.server.api.scoring.requests import LoglikelihoodRequest

router = APIRouter(prefix="/v1", tags=["scoring"])


@router.post(
    "/loglikelihood",
    response_model=LoglikelihoodAnswer,
    openapi_extra=json_request(LoglikelihoodRequest),
)
async def create_loglikelihood(
    request: Request,
    principal: Generator,
    body: Annotated[LoglikelihoodRequest, Depends(json_body(LoglikelihoodRequest))],
) -> Response:
    """The log-likelihood of each choice after a prompt, under the base model or a prefix."""
    service = service_of(request)
    body = with_user(body, request, service.user_header)
    admit = partial(ScoringAdmission(service.admission).loglikelihood, principal, body)
    try:
        async with service.running(
            request, principal, admit, endpoint=Endpoint.LOGLIKELIHOOD
        ) as running:
            choices = await scored_choices(running.events, running.admitted)
            answer = {
                **envelope(running.admitted, "loglikelihood"),
                "choices": choices,
                "usage": running.record.usage(),
                **running.admitted.head,
            }
            return JSONResponse(answer, 200, running.headers)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
