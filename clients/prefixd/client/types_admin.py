"""What the server answers to an admin key, as frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from prefixd.client.wire import maybe, moment, read, strings


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant; ``quota`` holds its limits by name, None where there is none."""

    name: str
    created_at: datetime
    default_prefix: str | None
    weight: float
    kv_reuse: bool
    quota: Mapping[str, object]

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From a tenant object."""
        return cls(
            name=read(source, "name", str),
            created_at=moment(source, "created_at"),
            default_prefix=maybe(source, "default_prefix", str),
            weight=read(source, "weight", float),
            kv_reuse=read(source, "kv_reuse", bool),
            quota=read(source, "quota", dict),
        )


@dataclass(frozen=True, slots=True)
class Key:
    """An API key; ``secret`` is there where it was just made, and never again.

    ``state`` is ``active``, ``replaced``, ``expired`` or ``revoked``.
    """

    key_id: str
    tenant: str
    label: str
    scopes: tuple[str, ...]
    state: str
    created_at: datetime
    expires_at: datetime | None
    replaced_by: str | None
    secret: str | None

    def __repr__(self) -> str:
        return f"Key({self.key_id!r}, tenant={self.tenant!r}, state={self.state!r})"

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From a key object."""
        ends = source.get("expires_at") is not None
        return cls(
            key_id=read(source, "key_id", str),
            tenant=read(source, "tenant", str),
            label=read(source, "label", str),
            scopes=strings(source, "scopes"),
            state=read(source, "state", str),
            created_at=moment(source, "created_at"),
            expires_at=moment(source, "expires_at") if ends else None,
            replaced_by=maybe(source, "replaced_by", str),
            secret=maybe(source, "key", str),
        )


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing done. ``actor_key`` None means the command line on the catalog."""

    id: int
    at: datetime
    tenant: str
    action: str
    subject: str
    actor_tenant: str | None
    actor_key: str | None
    request_id: str | None
    detail: Mapping[str, object]

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From an audit entry object."""
        return cls(
            id=read(source, "id", int),
            at=moment(source, "at"),
            tenant=read(source, "tenant", str),
            action=read(source, "action", str),
            subject=read(source, "subject", str),
            actor_tenant=maybe(source, "actor_tenant", str),
            actor_key=maybe(source, "actor_key", str),
            request_id=maybe(source, "request_id", str),
            detail=read(source, "detail", dict),
        )


@dataclass(frozen=True, slots=True)
class TenantPage:
    """Some tenants by name; pass ``next_after`` as ``after`` for more, if it is set."""

    tenants: tuple[Tenant, ...]
    next_after: str | None


@dataclass(frozen=True, slots=True)
class KeyPage:
    """Some keys, oldest first; pass ``next_after`` as ``after`` for more, if it is set."""

    keys: tuple[Key, ...]
    next_after: str | None


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Some entries, newest first; pass ``next_before`` as ``before`` for more, if it is set."""

    entries: tuple[AuditEntry, ...]
    next_before: int | None
