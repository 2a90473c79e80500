"""Authentication and scopes, as dependencies of every router except the public ones."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from prefixd.server.api.parts import TenantsDep
from prefixd.server.errors import Forbidden, NotAuthenticated
from prefixd.server.tenants.principal import OPERATOR_TENANT, Actor, Principal, Scope

_bearer = HTTPBearer(auto_error=False, description="An API key: `prefixd key create`.")


async def authenticated(
    request: Request,
    tenants: TenantsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """The principal behind the bearer key. Raises NotAuthenticated."""
    if credentials is None:
        raise NotAuthenticated(
            "an API key is needed: send the header 'Authorization: Bearer <key>'",
            code="missing_api_key",
        )
    principal = await run_in_threadpool(tenants.authenticate, credentials.credentials)
    request.state.principal = principal
    return principal


def requires(scope: Scope) -> Callable[[Principal], Awaitable[Principal]]:
    """A dependency that raises Forbidden for a key without ``scope``."""

    async def check(principal: Annotated[Principal, Depends(authenticated)]) -> Principal:
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


async def _actor(
    request: Request, principal: Annotated[Principal, Depends(authenticated)]
) -> Actor:
    request_id = getattr(request.state, "request_id", None)
    return Actor(tenant=principal.tenant, key_id=principal.key_id, request_id=request_id)


Acting = Annotated[Actor, Depends(_actor)]
"""The actor that the audit log records for a request."""
