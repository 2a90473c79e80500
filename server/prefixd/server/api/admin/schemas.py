"""Request and response bodies of /v1/admin."""

from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from prefixd.server.api.body import StrictModel
from prefixd.server.tenants.principal import Scope
from prefixd.server.tenants.quotas import LEAST_WEIGHT, MOST_WEIGHT

_DAY = 24 * 3600
_CENTURY = 100 * 366 * _DAY

Amount = Annotated[int | None, Field(ge=0, lt=2**63)]
Rate = Annotated[int | None, Field(ge=1, lt=2**63)]


class QuotaChange(StrictModel):
    """Limits of a tenant. An omitted limit is unchanged; null means no limit."""

    max_prefixes: Amount = None
    max_versions: Amount = None
    max_aliases: Amount = None
    max_bytes: Amount = None
    max_users: Amount = None
    max_keys: Amount = None
    max_idempotency_keys: Amount = None
    max_virtual_tokens: Amount = Field(default=None, description="Of one prefix.")
    max_resident_tokens: Amount = None
    requests_per_minute: Rate = None
    tokens_per_minute: Rate = None
    other_requests_per_minute: Rate = Field(
        default=None, description="That neither generate, upload nor warm; by each server."
    )
    max_concurrent_requests: Rate = None
    max_files: Amount = None
    max_file_bytes: Amount = Field(default=None, description="Of all files together.")
    max_batch_lines: Amount = Field(default=None, description="Of one batch.")
    max_open_batches: Amount = Field(default=None, description="That have not ended.")


class TenantChange(StrictModel):
    """Weight and KV reuse of a tenant. An omitted field is unchanged."""

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
    """A tenant to create."""

    name: str
    quota: QuotaChange | None = None


class NewKeyRequest(StrictModel):
    """A key to create. Only the operator may name another tenant."""

    tenant: str | None = None
    scopes: list[Scope] | None = Field(default=None, description="Default: all except admin.")
    label: str = ""
    expires_in_seconds: float | None = Field(
        default=None, gt=0, le=_CENTURY, description="Default: never."
    )


class Rotation(StrictModel):
    """How long the old key stays valid after the new one was issued."""

    overlap_seconds: float = Field(default=_DAY, ge=0, le=_CENTURY)


def _quota(value: Any) -> Any:
    """A quota of the catalog, or of a stored response, which is an object already."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


class TenantShown(BaseModel):
    """A tenant; a null in ``quota`` means no limit, and ``unlimited`` names these."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["tenant"] = "tenant"
    name: str
    created_at: datetime
    default_prefix: str | None
    quota: Annotated[dict[str, int | None], BeforeValidator(_quota)]
    unlimited: list[str]
    weight: float
    kv_reuse: bool


class TenantDetails(TenantShown):
    """A tenant with what it has now: ``used`` by the name of the quota, and all its keys."""

    used: dict[str, int]
    keys: int


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


class KeyIssued(KeyShown):
    """A new key with its secret, which is shown only once: null in a response that an
    Idempotency-Key repeats."""

    key: str | None


class KeyList(BaseModel):
    """Some keys, oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyShown]
    next_after: str | None = None


class AuditEntryShown(BaseModel):
    """An audited action; no actor means the command line on the catalog."""

    model_config = ConfigDict(from_attributes=True)

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


class AuditList(BaseModel):
    """Some entries, newest first."""

    object: Literal["list"] = "list"
    data: list[AuditEntryShown]
    next_before: int | None = None


class EngineState(BaseModel):
    """Ids, counts and names of tenants; docs/api.md describes the other fields."""

    model_config = ConfigDict(extra="allow")

    object: Literal["engine_state"] = "engine_state"
    ready: bool
    trouble: str | None
