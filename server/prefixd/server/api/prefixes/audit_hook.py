"""The audit entry of a change to a prefix, as the store's transactions take it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from prefixd.server.tenants.audit import Action, AuditLog
from prefixd.server.tenants.principal import Actor


@dataclass(frozen=True, slots=True)
class AuditHook:
    """Writes the audit entry into the store's transaction."""

    audit: AuditLog
    actor: Actor
    action: Action
    tenant: str
    name: str
    detail: Mapping[str, Any]

    def __call__(self, connection: Connection, *_: object) -> None:
        self.audit.add(
            connection,
            self.action,
            actor=self.actor,
            tenant=self.tenant,
            subject=self.name,
            **self.detail,
        )
