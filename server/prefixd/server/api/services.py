"""The parts a request needs, put together by ``serve`` and found on the application."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request
from sqlalchemy import Engine as Database

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.request_record import Tracer
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.engine import Engine
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.registry import Tenants
from prefixd.store.store import PrefixStore


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
    drain_state: DrainState = field(default_factory=DrainState)


def services_of(request: Request) -> Services:
    """Dependency: the parts this application was built with."""
    return cast("Services", request.app.state.services)


ServicesDep = Annotated[Services, Depends(services_of)]
