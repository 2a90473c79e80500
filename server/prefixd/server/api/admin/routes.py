"""/v1/admin: tenants and their quotas, keys, the audit log, and the engine's state.

An admin key administers its own tenant; one of the operator's tenant administers all tenants. To
the former, another tenant's resource gives the same error as one that does not exist.
"""

from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from prefixd.server.api.admin.schemas import (
    AuditEntryShown,
    AuditList,
    EngineState,
    KeyIssued,
    KeyList,
    KeyShown,
    NewKeyRequest,
    NewTenantRequest,
    QuotaChange,
    Rotation,
    TenantChange,
    TenantDetails,
    TenantList,
    TenantShown,
)
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.dependencies import Acting, Admin, AuditDep, EngineDep, Operator, TenantsDep
from prefixd.server.api.repeats import RepeatableDep
from prefixd.server.api.values import WholeNumber
from prefixd.server.errors import BadRequest, NotFound, Unavailable
from prefixd.server.tenants.idempotency import Keep, Replay
from prefixd.server.tenants.principal import DEFAULT_SCOPES, Principal
from prefixd.server.tenants.quotas import SETTINGS
from prefixd.server.tenants.registry import IssuedKey, KeyRecord, TenantRecord, Tenants

router = APIRouter(prefix="/v1/admin", tags=["admin"], route_class=CatalogRoute)

Limit = Annotated[WholeNumber, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=128)]


def _owner(principal: Principal) -> str | None:
    """The only tenant a key may administer; None for the operator's, which may administer all."""
    return None if principal.is_operator else principal.tenant


def _known_tenant(principal: Principal, requested: str | None, tenants: Tenants) -> str | None:
    """As ``_tenant_for``; raises NotFound also for a tenant that does not exist."""
    name = _tenant_for(principal, requested)
    if name is not None:
        tenants.tenant(name)
    return name


def _tenant_for(principal: Principal, requested: str | None) -> str | None:
    """The tenant a call is about: the requested one, if the key may administer it; None is all.
    Raises NotFound."""
    owner = _owner(principal)
    if owner is None or requested in {None, owner}:
        return requested if owner is None else owner
    raise NotFound(f"no tenant {(requested or '')[:80]!a}", param="tenant")


def _with_state(key: KeyRecord) -> dict[str, Any]:
    return {**asdict(key), "state": key.state(datetime.now(UTC))}


def _with_secret(issued: IssuedKey) -> Replay:
    shown = KeyIssued(key=issued.text, **_with_state(issued.record))
    return Replay(201, shown.model_dump(mode="json"))


def _without_secret(issued: IssuedKey) -> Replay:
    """The response that is stored: no secret is, so a repeated request cannot show it."""
    shown = KeyIssued(key=None, **_with_state(issued.record))
    return Replay(201, shown.model_dump(mode="json"))


@router.get("/tenants", response_model=TenantList)
def list_tenants(
    tenants: TenantsDep, principal: Admin, limit: Limit = 100, after: After = None
) -> TenantList:
    """The tenants this key administers, by name."""
    owner = _owner(principal)
    if owner is not None:
        return TenantList(data=[TenantShown.model_validate(tenants.tenant(owner))])
    page = tenants.list_tenants(limit=limit + 1, after=after)
    more = page[limit - 1].name if len(page) > limit else None
    data = [TenantShown.model_validate(tenant) for tenant in page[:limit]]
    return TenantList(data=data, next_after=more)


@router.post(
    "/tenants",
    response_model=TenantShown,
    status_code=201,
    openapi_extra=json_request(NewTenantRequest),
)
def create_tenant(
    *,
    response: Response,
    tenants: TenantsDep,
    _principal: Operator,
    actor: Acting,
    repeat: RepeatableDep,
    body: Annotated[NewTenantRequest, Depends(json_body(NewTenantRequest))],
) -> Any:
    """Add a tenant. Operator only."""
    quota = {} if body.quota is None else body.quota.model_dump(exclude_unset=True)
    settings = body.model_dump(exclude_unset=True, include=set(SETTINGS))

    def stored(tenant: TenantRecord) -> Replay:
        return Replay(201, TenantShown.model_validate(tenant).model_dump(mode="json"))

    def change(keep: Keep) -> Replay:
        tenant = tenants.create_tenant(
            body.name,
            quota=quota,
            settings=settings,
            actor=actor,
            at_end=lambda connection, created: keep(connection, stored(created)),
        )
        return stored(tenant)

    return repeat.once_for(body, change, response)


@router.get("/tenants/{tenant}", response_model=TenantDetails)
def get_tenant(tenant: str, tenants: TenantsDep, principal: Admin) -> TenantDetails:
    """One tenant, its quotas and what it has of each."""
    name = _tenant_for(principal, tenant) or tenant
    usage = tenants.used(name)
    shown = {field.name: getattr(usage.tenant, field.name) for field in fields(usage.tenant)}
    return TenantDetails.model_validate({**shown, "used": usage.used, "keys": usage.keys})


@router.patch(
    "/tenants/{tenant}", response_model=TenantShown, openapi_extra=json_request(TenantChange)
)
def change_tenant(
    tenant: str,
    tenants: TenantsDep,
    _principal: Operator,
    actor: Acting,
    body: Annotated[TenantChange, Depends(json_body(TenantChange))],
) -> TenantShown:
    """Change a tenant's weight and KV reuse, from its next request on. Operator only."""
    changes = body.model_dump(exclude_unset=True)
    return TenantShown.model_validate(tenants.set_settings(tenant, changes, actor=actor))


@router.patch(
    "/tenants/{tenant}/quota", response_model=TenantShown, openapi_extra=json_request(QuotaChange)
)
def change_quota(
    tenant: str,
    tenants: TenantsDep,
    _principal: Operator,
    actor: Acting,
    body: Annotated[QuotaChange, Depends(json_body(QuotaChange))],
) -> TenantShown:
    """Change the limits that are named; null lifts one. Operator only."""
    changes = body.model_dump(exclude_unset=True)
    return TenantShown.model_validate(tenants.set_quota(tenant, changes, actor=actor))


@router.get("/keys", response_model=KeyList)
def list_keys(
    tenants: TenantsDep,
    principal: Admin,
    tenant: After = None,
    limit: Limit = 100,
    after: After = None,
) -> KeyList:
    """Keys without their secrets, oldest first."""
    owner = _known_tenant(principal, tenant, tenants)
    page = tenants.list_keys(owner, limit=limit + 1, after=after)
    more = page[limit - 1].key_id if len(page) > limit else None
    return KeyList(data=[KeyShown(**_with_state(key)) for key in page[:limit]], next_after=more)


@router.post(
    "/keys", response_model=KeyIssued, status_code=201, openapi_extra=json_request(NewKeyRequest)
)
def create_key(
    *,
    response: Response,
    tenants: TenantsDep,
    principal: Admin,
    actor: Acting,
    repeat: RepeatableDep,
    body: Annotated[NewKeyRequest, Depends(json_body(NewKeyRequest))],
) -> Any:
    """Issue a key and show its secret only once: repeated under an Idempotency-Key, `key` is
    null."""
    named = _tenant_for(principal, body.tenant)
    tenant = principal.tenant if named is None else named
    lifetime = body.expires_in_seconds
    expires_at = None if lifetime is None else datetime.now(UTC) + timedelta(seconds=lifetime)

    def change(keep: Keep) -> Replay:
        issued = tenants.create_key(
            tenant=tenant,
            scopes=DEFAULT_SCOPES if body.scopes is None else body.scopes,
            label=body.label,
            expires_at=expires_at,
            actor=actor,
            at_end=lambda connection, key: keep(connection, _without_secret(key)),
        )
        return _with_secret(issued)

    return repeat.once_for(body, change, response)


@router.post(
    "/keys/{key_id}/rotate",
    response_model=KeyIssued,
    status_code=201,
    openapi_extra=json_request(Rotation),
)
def rotate_key(
    *,
    key_id: str,
    response: Response,
    tenants: TenantsDep,
    principal: Admin,
    actor: Acting,
    repeat: RepeatableDep,
    body: Annotated[Rotation, Depends(json_body(Rotation))],
) -> Any:
    """Issue a successor; the old key stays valid for the overlap. Repeated under an
    Idempotency-Key, `key` is null."""

    def change(keep: Keep) -> Replay:
        issued = tenants.rotate_key(
            key_id,
            overlap=timedelta(seconds=body.overlap_seconds),
            owner=_owner(principal),
            actor=actor,
            at_end=lambda connection, key: keep(connection, _without_secret(key)),
        )
        return _with_secret(issued)

    return repeat.once_for(body, change, response, within_quota=False)


@router.delete("/keys/{key_id}", response_model=KeyShown)
def revoke_key(key_id: str, tenants: TenantsDep, principal: Admin, actor: Acting) -> KeyShown:
    """Revoke a key permanently, from its next request on."""
    if key_id == principal.key_id:
        raise BadRequest(
            "a key cannot revoke itself: use another one, or rotate it", param="key_id"
        )
    key = tenants.revoke_key(key_id, owner=_owner(principal), actor=actor)
    return KeyShown(**_with_state(key))


@router.get("/audit", response_model=AuditList)
def read_audit(
    *,
    audit: AuditDep,
    tenants: TenantsDep,
    principal: Admin,
    tenant: After = None,
    limit: Limit = 100,
    before: Annotated[WholeNumber | None, Query(ge=1, le=2**63 - 1)] = None,
) -> AuditList:
    """Audited actions, newest first; pass `next_before` as `before` for older ones."""
    owner = _known_tenant(principal, tenant, tenants)
    page, more = audit.page(tenant=owner, limit=limit, before=before)
    data = [AuditEntryShown.model_validate(entry) for entry in page]
    return AuditList(data=data, next_before=more)


@router.get("/state", response_model=EngineState)
def engine_state(engine: EngineDep, _principal: Operator) -> dict[str, Any]:
    """Running and waiting requests, resident and pinned prefixes, as of now. Operator only."""
    try:
        debug_state = engine.state()
    except TimeoutError:
        reason = engine.trouble or "the engine is in the middle of a long step"
        raise Unavailable(reason, retry_after=1) from None
    trouble = engine.trouble
    return {"ready": trouble is None, "trouble": trouble, **debug_state}
