"""The parts a request needs, put together by ``server.app`` and found on the application."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request
from sqlalchemy import Engine as Database

from prefix_store.store import PrefixStore
from server.api.intake import Intake
from server.api.metrics import Metrics
from server.api.record import Tracer
from server.api.served import ServedModel
from server.engine.engine import Engine
from server.tenants.audit import AuditLog
from server.tenants.bindings import Bindings
from server.tenants.idempotency import Idempotency
from server.tenants.limiter import Limiter
from server.tenants.registry import Tenants


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """The API room's slice of the settings. Sizes in bytes, times in seconds, rates in bytes per
    second."""

    upload_dir: Path
    max_body_bytes: int
    max_prefix_bytes: int
    max_choices: int
    body_timeout: float
    min_body_rate: int
    max_import_bytes: int
    max_request_seconds: float | None = None
    kv_reuse: bool = True
    max_pinned_tokens: int | None = None  # a quarter of the pool


@dataclass(frozen=True, slots=True)
class Services:
    """Everything behind the routes."""

    limits: ApiLimits
    store: PrefixStore
    tenants: Tenants
    bindings: Bindings
    limiter: Limiter
    audit: AuditLog
    idempotency: Idempotency
    engine: Engine
    served: ServedModel
    metrics: Metrics
    trace: Tracer | None = None
    database: Database | None = None
    intake: Intake = field(default_factory=Intake)


def services_of(request: Request) -> Services:
    """Dependency: the parts this application was built with."""
    return cast("Services", request.app.state.services)


ServicesDep = Annotated[Services, Depends(services_of)]
