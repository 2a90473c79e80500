"""The audit log of changes to prefixes, keys, bindings and tenants: append and read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select

from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.tables import audit_log
from prefixd.store.db.database import reading, utc_now


class Action(StrEnum):
    """An audited action."""

    PREFIX_PUBLISH = "prefix.publish"
    PREFIX_METADATA = "prefix.metadata"
    PREFIX_DELETE = "prefix.delete"
    VERSION_DELETE = "version.delete"
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
    FILE_CREATE = "file.create"
    FILE_DELETE = "file.delete"
    BATCH_CREATE = "batch.create"
    BATCH_CANCEL = "batch.cancel"
    BATCH_END = "batch.end"
    TENANT_CREATE = "tenant.create"
    TENANT_QUOTA = "tenant.quota"
    TENANT_SETTINGS = "tenant.settings"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One audited action. ``actor_key`` is None for the command line."""

    id: int
    at: datetime
    tenant: str
    action: str
    subject: str
    actor_tenant: str | None
    actor_key: str | None
    request_id: str | None
    detail: Mapping[str, Any]


_COLUMNS = tuple(field.name for field in fields(AuditEntry) if field.name != "detail")


def record(
    connection: Connection,
    action: Action,
    *,
    actor: Actor,
    tenant: str,
    subject: str,
    at: datetime | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Add an entry to the transaction of the action: both are committed, or neither. ``at`` is now
    by default."""
    connection.execute(
        insert(audit_log).values(
            at=at or utc_now(),
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

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def page(
        self, *, tenant: str | None, limit: int, before: int | None = None
    ) -> tuple[list[AuditEntry], int | None]:
        """Entries of one tenant or of all, newest first, and the ``before`` for more."""
        query = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit + 1)
        if tenant is not None:
            query = query.where(audit_log.c.tenant == tenant)
        if before is not None:
            query = query.where(audit_log.c.id < before)
        with reading(self._engine) as connection:
            page = [_entry(row) for row in connection.execute(query)]
        more = len(page) > limit
        return page[:limit], page[limit - 1].id if more else None


def _entry(row: Row[Any]) -> AuditEntry:
    columns = {name: getattr(row, name) for name in _COLUMNS}
    return AuditEntry(**columns, detail=json.loads(row.detail_json))
