"""The audit log: who did what to which prefix, key, binding and tenant. Append and read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select

from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.tables import audit_log
from prefixd.store.db.database import reading


class Action(StrEnum):
    """What can be done."""

    PREFIX_PUBLISH = "prefix.publish"
    PREFIX_DELETE = "prefix.delete"
    ALIAS_SET = "alias.set"
    ALIAS_REMOVE = "alias.remove"
    PIN_SET = "pin.set"
    PIN_REMOVE = "pin.remove"
    BINDING_SET = "binding.set"
    BINDING_REMOVE = "binding.remove"
    BINDINGS_IMPORT = "bindings.import"
    DEFAULT_SET = "default.set"
    DEFAULT_REMOVE = "default.remove"
    KEY_CREATE = "key.create"
    KEY_ROTATE = "key.rotate"
    KEY_REVOKE = "key.revoke"
    TENANT_CREATE = "tenant.create"
    TENANT_QUOTA = "tenant.quota"
    TENANT_SETTINGS = "tenant.settings"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing done. ``actor_key`` is None for the command line."""

    id: int
    at: datetime
    tenant: str
    action: str
    subject: str
    actor_tenant: str | None
    actor_key: str | None
    request_id: str | None
    detail: Mapping[str, Any]


def utc_now() -> datetime:
    """The clock of this room, unless a test brings another."""
    return datetime.now(UTC)


def record(
    connection: Connection,
    action: Action,
    *,
    at: datetime,
    actor: Actor,
    tenant: str,
    subject: str,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Add an entry to the transaction that does what it says: both happen, or neither."""
    connection.execute(
        insert(audit_log).values(
            at=at,
            tenant=tenant,
            action=action.value,
            subject=subject,
            actor_tenant=actor.tenant,
            actor_key=actor.key_id,
            request_id=actor.request_id,
            detail_json=json.dumps(dict(detail or {}), sort_keys=True),
        )
    )


class AuditLog:
    """Blocking calls on the catalog; safe to share between threads."""

    def __init__(self, engine: Engine, *, now: Callable[[], datetime] = utc_now) -> None:
        self._engine = engine
        self._now = now

    def add(
        self,
        connection: Connection,
        action: Action,
        *,
        actor: Actor,
        tenant: str,
        subject: str,
        **detail: Any,
    ) -> None:
        """``record`` at this moment."""
        record(
            connection,
            action,
            at=self._now(),
            actor=actor,
            tenant=tenant,
            subject=subject,
            detail=detail,
        )

    def page(
        self, *, tenant: str | None, limit: int, before: int | None = None
    ) -> tuple[list[AuditEntry], int | None]:
        """Entries of one tenant or of all, newest first, and what ``before`` takes for more."""
        query = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit + 1)
        if tenant is not None:
            query = query.where(audit_log.c.tenant == tenant)
        if before is not None:
            query = query.where(audit_log.c.id < before)
        with reading(self._engine) as connection:
            found = [_entry(row) for row in connection.execute(query)]
        more = len(found) > limit
        return found[:limit], found[limit - 1].id if more else None


def _entry(row: Row[Any]) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        at=row.at,
        tenant=row.tenant,
        action=row.action,
        subject=row.subject,
        actor_tenant=row.actor_tenant,
        actor_key=row.actor_key,
        request_id=row.request_id,
        detail=json.loads(row.detail_json),
    )
