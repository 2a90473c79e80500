"""Public routes: health and metrics. They show no tenant, prefix or prompt.

They run on the event loop and wait for nothing, so that they respond while a thread pool, the
database or the bucket hangs.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from prefixd.server.api.dependencies import (
    CatalogAccessDep,
    DrainStateDep,
    EngineDep,
    ServedDep,
    part,
)
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.served import DecoderInfo

router = APIRouter(tags=["operation"])

MetricsDep = Annotated[Metrics, part("metrics")]


class HealthResponse(BaseModel):
    """``ok``, or the reason why not."""

    status: Literal["ok", "not ready"]
    reason: str | None = None


class ReadyResponse(HealthResponse):
    """With what computes the model."""

    decoder: DecoderInfo


@router.get("/health/live", response_model=HealthResponse, response_model_exclude_none=True)
async def live() -> HealthResponse:
    """The process responds."""
    return HealthResponse(status="ok")


@router.get(
    "/health/ready",
    response_model=ReadyResponse,
    responses={503: {"description": "Not now.", "model": ReadyResponse}},
)
async def ready(
    engine: EngineDep, drain_state: DrainStateDep, catalog: CatalogAccessDep, served: ServedDep
) -> Response:
    """The engine steps, the catalog responds and the server takes requests; otherwise ``reason``
    says why not."""
    decoder = served.decoder.facts()
    reason = engine.trouble or catalog.health.trouble
    if drain_state.closed:
        reason = drain_state.reason
    if reason is None:
        return JSONResponse({"status": "ok", "decoder": decoder})
    return JSONResponse({"status": "not ready", "reason": reason, "decoder": decoder}, 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(metrics: MetricsDep) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)
