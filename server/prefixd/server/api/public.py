"""Routes without a key: health and metrics. Neither names a tenant, a prefix or a prompt."""

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from prefixd.server.api.services import Services, ServicesDep

router = APIRouter(tags=["operation"])


class HealthResponse(BaseModel):
    """``ok``, or why not."""

    status: Literal["ok", "not ready"]
    reason: str | None = None


@router.get("/health/live", response_model=HealthResponse, response_model_exclude_none=True)
def live() -> HealthResponse:
    """The process answers."""
    return HealthResponse(status="ok")


@router.get(
    "/health/ready",
    response_model=HealthResponse,
    responses={503: {"description": "Not now.", "model": HealthResponse}},
)
def ready(services: ServicesDep) -> Response:
    """The engine steps and the server takes requests; else a sentence says why not."""
    reason = _why_not(services)
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "not ready", "reason": reason}, 503)


def _why_not(services: Services) -> str | None:
    if services.drain_state.closed:
        return "the server is shutting down"
    return services.engine.trouble


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(services: ServicesDep) -> Response:
    """Figures in Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
