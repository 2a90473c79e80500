"""The application's parts as dependencies: a route's signature names those that it uses.

``create_app`` stores each part on the application's state under the name given here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.engine import Engine
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.quotas import PinRoom
from prefixd.server.tenants.registry import Tenants
from prefixd.store.store import PrefixStore


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest request bodies, in bytes, and the folder for uploads in flight."""

    upload_dir: Path
    max_body_bytes: int
    max_prefix_bytes: int
    max_import_bytes: int


def part(name: str) -> Any:
    """A dependency on the part that the application's state has as ``name``."""

    async def get(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(get)


AuditDep = Annotated[AuditLog, part("audit")]
BindingsDep = Annotated[Bindings, part("bindings")]
BodyLimitsDep = Annotated[BodyLimits, part("body_limits")]
DrainStateDep = Annotated[DrainState, part("drain_state")]
EngineDep = Annotated[Engine, part("engine")]
IdempotencyDep = Annotated[Idempotency, part("idempotency")]
LimiterDep = Annotated[Limiter, part("limiter")]
PinRoomDep = Annotated[PinRoom, part("pin_room")]
ServedDep = Annotated[ServedModel, part("served")]
StoreDep = Annotated[PrefixStore, part("store")]
TenantsDep = Annotated[Tenants, part("tenants")]
