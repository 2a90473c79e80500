"""Routes without a key: health and metrics. Neither names a tenant, a prefix or a prompt."""

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from server.api.services import ServicesDep

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    """``ok``, or why not."""

    status: Literal["ok", "not ready"]


@router.get("/health/live", response_model=Health)
def live() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get(
    "/health/ready",
    response_model=Health,
    responses={503: {"description": "Not now.", "model": Health}},
)
def ready(services: ServicesDep) -> Response:
    """The model is loaded and the engine's loop is alive."""
    if services.engine.ready:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "not ready"}, 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(services: ServicesDep) -> Response:
    """Figures in Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
