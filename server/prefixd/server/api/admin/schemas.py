"""Bodies of /v1/admin, in and out."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from prefixd.server.api.body import StrictModel
from prefixd.server.tenants.audit import AuditEntry
from prefixd.server.tenants.principal import Scope
from prefixd.server.tenants.registry import KeyRecord, TenantRecord
from prefixd.server.tenants.tenant_settings import LEAST_WEIGHT, MOST_WEIGHT

_DAY = 24 * 3600
_CENTURY = 100 * 366 * _DAY

Amount = Annotated[int | None, Field(ge=0, lt=2**63)]
Rate = Annotated[int | None, Field(ge=1, lt=2**63)]


class QuotaChange(StrictModel):
    """Limits of a tenant. One that is not named stays as it is; null is no limit."""

    max_prefixes: Amount = None
    max_bytes: Amount = None
    max_virtual_tokens: Amount = Field(default=None, description="Of one prefix.")
    max_resident_tokens: Amount = None
    requests_per_minute: Rate = None
    tokens_per_minute: Rate = None
    max_concurrent_requests: Rate = None


class TenantChange(StrictModel):
    """How a tenant is treated beside others. What is not named stays as it is."""

    weight: float = Field(
        default=1.0,
        ge=LEAST_WEIGHT,
        le=MOST_WEIGHT,
        description="Share of a busy server against other tenants': 2 gets twice as much.",
    )
    kv_reuse: bool = Field(
        default=True, description="Whether its requests share KV of equal tokens with one another."
    )


class NewTenantRequest(TenantChange):
    """A tenant to be."""

    name: str
    quota: QuotaChange | None = None


class NewKeyRequest(StrictModel):
    """A key to be. Only the operator may name another tenant."""

    tenant: str | None = None
    scopes: list[Scope] | None = Field(default=None, description="Default: all but admin.")
    label: str = ""
    expires_in_seconds: float | None = Field(
        default=None, gt=0, le=_CENTURY, description="Default: never."
    )


class Rotation(StrictModel):
    """How long the old key stays good beside the new one."""

    overlap_seconds: float = Field(default=_DAY, ge=0, le=_CENTURY)


class TenantShown(BaseModel):
    """A tenant; a limit that is null is none."""

    object: Literal["tenant"] = "tenant"
    name: str
    created_at: datetime
    default_prefix: str | None
    quota: dict[str, int | None]
    weight: float
    kv_reuse: bool

    @classmethod
    def of(cls, tenant: TenantRecord) -> Self:
        """``tenant`` as it is shown."""
        return cls(
            name=tenant.name,
            created_at=tenant.created_at,
            default_prefix=tenant.default_prefix,
            quota=asdict(tenant.quota),
            weight=tenant.weight,
            kv_reuse=tenant.kv_reuse,
        )


class TenantList(BaseModel):
    """Some tenants by name."""

    object: Literal["list"] = "list"
    data: list[TenantShown]
    next_after: str | None = None


class KeyShown(BaseModel):
    """A key without its secret. ``replaced_by`` is the key that a rotation made."""

    object: Literal["key"] = "key"
    key_id: str
    tenant: str
    label: str
    scopes: list[Scope]
    state: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    replaced_by: str | None

    @classmethod
    def of(cls, key: KeyRecord, *, now: datetime) -> Self:
        """``key`` as it is shown."""
        return cls(**{**asdict(key), "scopes": list(key.scopes)}, state=key.state(now))


class KeyIssued(KeyShown):
    """A key just made, with its secret, which cannot be had again."""

    key: str


class KeyList(BaseModel):
    """Some keys, oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyShown]
    next_after: str | None = None


class AuditEntryShown(BaseModel):
    """One thing done; no actor means the command line on the catalog."""

    object: Literal["audit_entry"] = "audit_entry"
    id: int
    at: datetime
    tenant: str
    action: str
    subject: str
    actor_tenant: str | None
    actor_key: str | None
    request_id: str | None
    detail: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry) -> Self:
        """``entry`` as it is shown."""
        return cls(**{**asdict(entry), "detail": dict(entry.detail)})


class AuditList(BaseModel):
    """Some entries, newest first."""

    object: Literal["list"] = "list"
    data: list[AuditEntryShown]
    next_before: int | None = None
