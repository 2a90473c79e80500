"""/v1/admin: tenants and their quotas, keys, and the audit log.

An admin key administers its own tenant; one of the operator's tenant administers them all. What is
another tenant's is as unknown to the former as what does not exist.
"""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.concurrency import run_in_threadpool

from prefixd.server.api.admin.schemas import (
    AuditEntryShown,
    AuditList,
    KeyIssued,
    KeyList,
    KeyShown,
    NewKeyRequest,
    NewTenantRequest,
    QuotaChange,
    Rotation,
    TenantChange,
    TenantList,
    TenantShown,
)
from prefixd.server.api.auth import Acting, Admin, Operator
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.parts import AuditDep, TenantsDep
from prefixd.server.errors import BadRequest, NotFound
from prefixd.server.tenants.principal import DEFAULT_SCOPES, Principal
from prefixd.server.tenants.registry import KeyRecord
from prefixd.server.tenants.tenant_settings import SETTINGS

router = APIRouter(prefix="/v1/admin", tags=["admin"])

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=128)]


def _owner(principal: Principal) -> str | None:
    """Whose things a call is confined to; None for the operator's, which is not confined."""
    return None if principal.is_operator else principal.tenant


def _tenant_for(principal: Principal, asked: str | None) -> str | None:
    """The tenant a call is about: the one asked for, where that is allowed. Raises NotFound."""
    owner = _owner(principal)
    if owner is None or asked in {None, owner}:
        return asked if owner is None else owner
    raise NotFound(f"there is no tenant {(asked or '')[:80]!a}", param="tenant")


@router.get("/tenants", response_model=TenantList)
def list_tenants(
    tenants: TenantsDep, principal: Admin, limit: Limit = 100, after: After = None
) -> TenantList:
    """The tenants this key administers, by name."""
    owner = _owner(principal)
    if owner is not None:
        return TenantList(data=[TenantShown.of(tenants.tenant(owner))])
    found = tenants.list_tenants(limit=limit + 1, after=after)
    more = found[limit - 1].name if len(found) > limit else None
    return TenantList(data=[TenantShown.of(one) for one in found[:limit]], next_after=more)


@router.post(
    "/tenants",
    response_model=TenantShown,
    status_code=201,
    openapi_extra=json_request(NewTenantRequest),
)
async def create_tenant(
    tenants: TenantsDep,
    _principal: Operator,
    actor: Acting,
    body: Annotated[NewTenantRequest, Depends(json_body(NewTenantRequest))],
) -> TenantShown:
    """Add a tenant. Operator only."""
    quota = {} if body.quota is None else body.quota.model_dump(exclude_unset=True)
    settings = body.model_dump(exclude_unset=True, include=set(SETTINGS))
    made = await run_in_threadpool(
        tenants.create_tenant, body.name, quota=quota, settings=settings, actor=actor
    )
    return TenantShown.of(made)


@router.get("/tenants/{tenant}", response_model=TenantShown)
def get_tenant(tenant: str, tenants: TenantsDep, principal: Admin) -> TenantShown:
    """One tenant and its quotas."""
    return TenantShown.of(tenants.tenant(_tenant_for(principal, tenant) or tenant))


@router.patch(
    "/tenants/{tenant}", response_model=TenantShown, openapi_extra=json_request(TenantChange)
)
async def change_tenant(
    tenant: str,
    tenants: TenantsDep,
    _principal: Operator,
    actor: Acting,
    body: Annotated[TenantChange, Depends(json_body(TenantChange))],
) -> TenantShown:
    """Change how a tenant is treated beside others, from its next request on. Operator only."""
    changes = body.model_dump(exclude_unset=True)
    return TenantShown.of(
        await run_in_threadpool(tenants.set_settings, tenant, changes, actor=actor)
    )


@router.patch(
    "/tenants/{tenant}/quota", response_model=TenantShown, openapi_extra=json_request(QuotaChange)
)
async def change_quota(
    tenant: str,
    tenants: TenantsDep,
    _principal: Operator,
    actor: Acting,
    body: Annotated[QuotaChange, Depends(json_body(QuotaChange))],
) -> TenantShown:
    """Change the limits that are named; null lifts one. Operator only."""
    changes = body.model_dump(exclude_unset=True)
    return TenantShown.of(await run_in_threadpool(tenants.set_quota, tenant, changes, actor=actor))


@router.get("/keys", response_model=KeyList)
def list_keys(
    tenants: TenantsDep,
    principal: Admin,
    tenant: After = None,
    limit: Limit = 100,
    after: After = None,
) -> KeyList:
    """Keys without their secrets, oldest first."""
    owner = _tenant_for(principal, tenant)
    found = tenants.list_keys(owner, limit=limit + 1, after=after)
    more = found[limit - 1].key_id if len(found) > limit else None
    return KeyList(data=[_shown(one) for one in found[:limit]], next_after=more)


@router.post(
    "/keys", response_model=KeyIssued, status_code=201, openapi_extra=json_request(NewKeyRequest)
)
async def create_key(
    tenants: TenantsDep,
    principal: Admin,
    actor: Acting,
    body: Annotated[NewKeyRequest, Depends(json_body(NewKeyRequest))],
) -> KeyIssued:
    """Issue a key and show its secret, this once."""
    tenant = _tenant_for(principal, body.tenant) or principal.tenant
    lifetime = body.expires_in_seconds
    issued = await run_in_threadpool(
        tenants.create_key,
        tenant=tenant,
        scopes=DEFAULT_SCOPES if body.scopes is None else body.scopes,
        label=body.label,
        expires_at=None if lifetime is None else datetime.now(UTC) + timedelta(seconds=lifetime),
        actor=actor,
    )
    return KeyIssued(key=issued.text, **_shown(issued.record).model_dump())


@router.post(
    "/keys/{key_id}/rotate",
    response_model=KeyIssued,
    status_code=201,
    openapi_extra=json_request(Rotation),
)
async def rotate_key(
    key_id: str,
    tenants: TenantsDep,
    principal: Admin,
    actor: Acting,
    body: Annotated[Rotation, Depends(json_body(Rotation))],
) -> KeyIssued:
    """Issue a successor; the old key stays good for the overlap."""
    issued = await run_in_threadpool(
        tenants.rotate_key,
        key_id,
        overlap=timedelta(seconds=body.overlap_seconds),
        owner=_owner(principal),
        actor=actor,
    )
    return KeyIssued(key=issued.text, **_shown(issued.record).model_dump())


@router.delete("/keys/{key_id}", response_model=KeyShown)
def revoke_key(key_id: str, tenants: TenantsDep, principal: Admin, actor: Acting) -> KeyShown:
    """Stop a key at its next request, for good."""
    if key_id == principal.key_id:
        raise BadRequest(
            "a key cannot revoke itself: use another one, or rotate it", param="key_id"
        )
    return _shown(tenants.revoke_key(key_id, owner=_owner(principal), actor=actor))


@router.get("/audit", response_model=AuditList)
def read_audit(
    audit: AuditDep,
    principal: Admin,
    tenant: After = None,
    limit: Limit = 100,
    before: Annotated[int | None, Query(ge=1, le=2**63 - 1)] = None,
) -> AuditList:
    """What was done, newest first; `next_before` is what `before` takes for more."""
    owner = _tenant_for(principal, tenant)
    found, more = audit.page(tenant=owner, limit=limit, before=before)
    return AuditList(data=[AuditEntryShown.of(one) for one in found], next_before=more)


def _shown(key: KeyRecord) -> KeyShown:
    return KeyShown.of(key, now=datetime.now(UTC))
