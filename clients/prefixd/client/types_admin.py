"""Responses of administration: tenants, keys, the audit log."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AwareDatetime, Field

from prefixd.client.types_base import NullIsDefault, ResponseModel


class Tenant(ResponseModel):
    """A tenant; ``quota`` holds its limits by name, None for no limit, and ``unlimited`` the names
    of those. ``used`` and ``keys`` are what it has; only ``show_tenant`` returns them."""

    name: str
    created_at: AwareDatetime
    default_prefix: str | None = None
    weight: float
    kv_reuse: bool
    quota: Mapping[str, object]
    unlimited: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    used: Mapping[str, object] | None = None
    keys: int | None = None


class Key(ResponseModel):
    """An API key. Only the response that issues it has its ``secret``.

    ``state`` is ``active``, ``replaced``, ``expired`` or ``revoked``.
    """

    key_id: str
    tenant: str
    label: str
    scopes: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    state: str
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    replaced_by: str | None = None
    secret: str | None = Field(default=None, validation_alias="key", repr=False)


class AuditEntry(ResponseModel):
    """One recorded change. ``actor_key`` None means the command line on the catalog."""

    id: int
    at: AwareDatetime
    tenant: str
    action: str
    subject: str
    actor_tenant: str | None = None
    actor_key: str | None = None
    request_id: str | None = None
    detail: Mapping[str, object]


class TenantPage(ResponseModel):
    """Some tenants by name; pass ``next_after`` as ``after`` for more, if it is set."""

    tenants: tuple[Tenant, ...] = Field(validation_alias="data")
    next_after: str | None = None


class KeyPage(ResponseModel):
    """Some keys, oldest first; pass ``next_after`` as ``after`` for more, if it is set."""

    keys: tuple[Key, ...] = Field(validation_alias="data")
    next_after: str | None = None


class AuditPage(ResponseModel):
    """Some entries, newest first; pass ``next_before`` as ``before`` for more, if it is set."""

    entries: tuple[AuditEntry, ...] = Field(validation_alias="data")
    next_before: int | None = None
