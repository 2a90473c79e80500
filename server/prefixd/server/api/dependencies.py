"""FastAPI dependencies: the application's parts, and the authenticated principal of a request.

A route's signature names the parts that it uses; ``create_app`` stores each on the application's
state under the name given here. Every router except the public ones depends on ``authenticated``.
What runs for every request takes both from the request: wherever a dependency is named, FastAPI
solves all that it depends on again.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.rendering.renderer import TemplateRenderer
from prefixd.server.api.served import ServedModel
from prefixd.server.api.tenant_bounds import KeyedSemaphore, TenantBounds
from prefixd.server.engine.engine import Engine
from prefixd.server.errors import Forbidden, NotAuthenticated
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.batches import Batches
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.pin_room import PinRoom
from prefixd.server.tenants.principal import OPERATOR_TENANT, Actor, Principal, Scope
from prefixd.server.tenants.registry import Tenants
from prefixd.store.disk import DiskGuard
from prefixd.store.store import PrefixStore

API_KEY_HEADER = "x-api-key"


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest request bodies, in bytes, and the folder for uploads in flight."""

    upload_dir: Path
    max_body_bytes: int
    max_prefix_bytes: int
    max_import_bytes: int
    max_input_bytes: int


def part(name: str) -> Any:
    """A dependency on the part that the application's state has as ``name``."""

    async def get(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(get)


BatchesDep = Annotated[Batches, part("batches")]
BatchOptionsDep = Annotated[BatchOptions, part("batch_options")]
AuditDep = Annotated[AuditLog, part("audit")]
BindingsDep = Annotated[Bindings, part("bindings")]
BoundsDep = Annotated[TenantBounds, part("bounds")]
BodyLimitsDep = Annotated[BodyLimits, part("body_limits")]
DiskDep = Annotated[DiskGuard, part("disk")]
CatalogAccessDep = Annotated[CatalogAccess, part("catalog")]
DrainStateDep = Annotated[DrainState, part("drain_state")]
EngineDep = Annotated[Engine, part("engine")]
IdempotencyDep = Annotated[Idempotency, part("idempotency")]
LimiterDep = Annotated[Limiter, part("limiter")]
PinRoomDep = Annotated[PinRoom, part("pin_room")]
ServedDep = Annotated[ServedModel, part("served")]
TemplatesDep = Annotated[TemplateRenderer, part("templates")]
StoreDep = Annotated[PrefixStore, part("store")]
TenantsDep = Annotated[Tenants, part("tenants")]


INSIDE = "inside"
"""In a request's state: the principal of one that the server sends to itself. It is of the
background class."""


class KeyBearer(HTTPBearer):
    """The dependency of every route that needs a key. It is also the entry of OpenAPI's security:
    one that named an HTTPBearer of its own would be two dependencies to solve."""

    async def __call__(self, request: Request) -> Principal:  # type: ignore[override]
        """The principal behind the bearer key, else behind that of ``x-api-key``, where Anthropic's
        clients send theirs. Raises NotAuthenticated."""
        inside: Principal | None = getattr(request.state, INSIDE, None)
        if inside is not None:
            request.state.principal = inside
            return inside
        credentials = await super().__call__(request)
        key = (
            request.headers.get(API_KEY_HEADER) if credentials is None else credentials.credentials
        )
        if not key:
            raise NotAuthenticated(
                "an API key is needed: send the header 'Authorization: Bearer <key>' or "
                f"'{API_KEY_HEADER}: <key>'",
                code="missing_api_key",
            )
        state = request.app.state
        tenants: Tenants = state.tenants
        bounds: TenantBounds = state.bounds
        catalog: CatalogAccess = state.catalog
        begun = time.monotonic()
        async with bounds.lookup(key, request.client):
            principal = await catalog.calls.read(
                tenants.authenticate, key, waited=time.monotonic() - begun
            )
        request.state.catalog_waited = time.monotonic() - begun
        request.state.principal = principal
        return principal


authenticated = KeyBearer(
    scheme_name="HTTPBearer", auto_error=False, description="An API key: `prefixd key create`."
)


def principal_of(request: Request) -> Principal:
    """The principal that ``authenticated`` found. Raises AttributeError when it has not run."""
    principal: Principal = request.state.principal
    return principal


def bounds_of(request: Request) -> TenantBounds:
    """The bounds of this server."""
    bounds: TenantBounds = request.app.state.bounds
    return bounds


async def within_bounds(request: Request) -> AsyncIterator[None]:
    """Count the request as in progress, until its response has been sent. Raises RateLimited."""
    with bounds_of(request).request(principal_of(request), rated=False):
        yield


async def within_rate(request: Request) -> AsyncIterator[None]:
    """As ``within_bounds``, for a request that the limiter does not count."""
    with bounds_of(request).request(principal_of(request), rated=True):
        yield


async def within_calls(request: Request) -> AsyncIterator[None]:
    """Wait for the tenant's other requests, and hold a place while the endpoint runs. A request
    with a body holds none while it is received: ``json_body`` takes it, for ``request.state.holds``
    to return. Raises Unavailable."""
    bounds, principal = bounds_of(request), principal_of(request)
    async with AsyncExitStack() as holds:
        request.state.holds = holds
        if request.method in {"GET", "HEAD"}:
            await hold_call(request, bounds.reads, principal)
        elif request.method == "DELETE":
            await hold_call(request, bounds.changes, principal)
        yield


async def hold_call(request: Request, calls: KeyedSemaphore, principal: Principal) -> None:
    """Wait for a place among the tenant's ``calls`` until the endpoint has run, if ``within_calls``
    applies to the route. Raises Unavailable."""
    state = request.state
    if not hasattr(state, "holds"):
        return
    waited, begun = getattr(state, "catalog_waited", 0.0), time.monotonic()
    await state.holds.enter_async_context(calls.hold(principal.tenant, waited=waited))
    state.catalog_waited = waited + time.monotonic() - begun


def requires(scope: Scope) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency that raises Forbidden for a key without ``scope``."""

    async def check(request: Request) -> Principal:
        principal = principal_of(request)
        if scope not in principal.scopes:
            scopes = ", ".join(sorted(principal.scopes))
            raise Forbidden(f"this needs a key with the scope '{scope}'; this key has: {scopes}")
        return principal

    return check


Reader = Annotated[Principal, Depends(requires(Scope.READ))]
Generator = Annotated[Principal, Depends(requires(Scope.GENERATE))]
Writer = Annotated[Principal, Depends(requires(Scope.WRITE))]
Admin = Annotated[Principal, Depends(requires(Scope.ADMIN))]


async def _operator(principal: Admin) -> Principal:
    if not principal.is_operator:
        raise Forbidden(
            f"this needs an admin key of the tenant '{OPERATOR_TENANT}'", code="operator_only"
        )
    return principal


Operator = Annotated[Principal, Depends(_operator)]


async def _actor(request: Request) -> Actor:
    principal = principal_of(request)
    request_id = getattr(request.state, "request_id", None)
    return Actor(tenant=principal.tenant, key_id=principal.key_id, request_id=request_id)


Acting = Annotated[Actor, Depends(_actor)]
"""The actor that the audit log records for a request."""
