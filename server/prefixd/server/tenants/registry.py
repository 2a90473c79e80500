"""Tenants with their quotas, settings and API keys."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from prefixd.server.errors import BadRequest, Conflict, NotFound
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.keyring import Keyring
from prefixd.server.tenants.principal import (
    COMMAND_LINE,
    DEFAULT_SCOPES,
    OPERATOR_TENANT,
    Actor,
    IssuedKey,
    KeyRecord,
    Principal,
    Scope,
)
from prefixd.server.tenants.quotas import (
    NO_LIMITS,
    Quota,
    TenantSettings,
    checked_quota,
    checked_settings,
)
from prefixd.server.tenants.tables import api_keys, tenants
from prefixd.server.tenants.usage import check_kept, used_by
from prefixd.store.db.database import reading, utc_now, writing

__all__ = [
    "DEFAULT_SCOPES",
    "OPERATOR_TENANT",
    "IssuedKey",
    "KeyRecord",
    "Principal",
    "Scope",
    "TenantRecord",
    "Tenants",
]

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant as listed. ``unlimited`` names the quotas that it has no limit for: all of them for
    a tenant from before new ones got defaults."""

    name: str
    created_at: datetime
    default_prefix: str | None = None
    quota: Quota = field(default_factory=Quota)
    weight: float = 1.0
    kv_reuse: bool = True
    unlimited: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unlimited", self.quota.unlimited)


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """A tenant and what it has: ``used`` by the name of the quota; ``keys`` ever issued."""

    tenant: TenantRecord
    used: Mapping[str, int]
    keys: int


class Tenants(Keyring):
    """Blocking calls on the catalog; safe to share between threads.

    Nothing is cached: a revoked key and a new quota apply from the next request on, on every
    replica. ``default_quota`` are the limits of a tenant that is created without others.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        now: Callable[[], datetime] = utc_now,
        default_quota: Quota = NO_LIMITS,
    ) -> None:
        super().__init__(engine, now=now, default_quota=default_quota)

    def create_tenant(
        self,
        name: str,
        *,
        quota: Mapping[str, int | None] | None = None,
        settings: Mapping[str, float | bool] | None = None,
        actor: Actor = COMMAND_LINE,
        at_end: Callable[[Connection, TenantRecord], object] = lambda *_: None,
    ) -> TenantRecord:
        """Add a tenant, with the named limits and settings and defaults for the others. ``at_end``
        runs in its transaction. Raises BadRequest for a malformed name or value, Conflict for a
        tenant that exists."""
        if _TENANT.fullmatch(name) is None:
            raise BadRequest(
                "expected a tenant name of 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or "
                f"digit; received {name[:80]!a}",
                param="name",
            )
        limits = replace(self._default_quota, **checked_quota(quota or {}))
        chosen = checked_settings(settings or {})
        complete = asdict(TenantSettings(**chosen))  # type: ignore[arg-type]  # checked by name
        tenant = TenantRecord(name=name, created_at=self._now(), quota=limits, **complete)
        row = {"name": name, "created_at": tenant.created_at, **asdict(limits), **complete}
        try:
            with writing(self._engine) as connection:
                connection.execute(insert(tenants).values(row))
                record(
                    connection,
                    Action.TENANT_CREATE,
                    at=tenant.created_at,
                    actor=actor,
                    tenant=name,
                    subject=name,
                    detail={**(quota or {}), **chosen},
                )
                at_end(connection, tenant)
        except IntegrityError as error:
            raise Conflict(f"tenant '{name}' already exists", param="name") from error
        return tenant

    def tenant(self, name: str) -> TenantRecord:
        """One tenant. Raises NotFound."""
        with reading(self._engine) as connection:
            row = connection.execute(select(tenants).where(tenants.c.name == name)).first()
        if row is None:
            raise NotFound(f"no tenant {name[:80]!a}", param="tenant")
        return _tenant_record(row)

    def used(self, name: str) -> TenantUsage:
        """What a tenant has of each quota, and its keys, now. Raises NotFound."""
        tenant, now = self.tenant(name), self._now()
        with reading(self._engine) as connection:
            used = used_by(connection, name, now=now)
            keys = select(func.count()).where(api_keys.c.tenant == name)
            num_keys = connection.execute(keys.select_from(api_keys)).scalar_one()
        return TenantUsage(tenant, used, num_keys)

    def check_kept(self, name: str, quota: Quota) -> None:
        """Raise QuotaExceeded when the tenant's blobs leave no room for an upload."""
        with reading(self._engine) as connection:
            check_kept(connection, name, quota)

    def list_tenants(
        self, *, limit: int | None = None, after: str | None = None
    ) -> list[TenantRecord]:
        """Tenants by name, at most ``limit`` after the name ``after``."""
        query = select(tenants).order_by(tenants.c.name).limit(limit)
        if after is not None:
            query = query.where(tenants.c.name > after)
        with reading(self._engine) as connection:
            return [_tenant_record(row) for row in connection.execute(query)]

    def resident_caps(self, names: Collection[str]) -> dict[str, int]:
        """``max_resident_tokens`` of those of ``names`` that have such a limit."""
        query = select(tenants.c.name, tenants.c.max_resident_tokens).where(
            tenants.c.name.in_(sorted(names)), tenants.c.max_resident_tokens.is_not(None)
        )
        with reading(self._engine) as connection:
            return {row.name: row.max_resident_tokens for row in connection.execute(query)}

    def set_quota(
        self, name: str, changes: Mapping[str, int | None], *, actor: Actor = COMMAND_LINE
    ) -> TenantRecord:
        """Change the limits named in ``changes``; None lifts one. Raises BadRequest, NotFound."""
        return self._change(name, Action.TENANT_QUOTA, checked_quota(changes), actor)

    def set_settings(
        self, name: str, changes: Mapping[str, float | bool], *, actor: Actor = COMMAND_LINE
    ) -> TenantRecord:
        """Change the settings named in ``changes``. Raises BadRequest, NotFound."""
        return self._change(name, Action.TENANT_SETTINGS, checked_settings(changes), actor)

    def _change(
        self, name: str, action: Action, checked: Mapping[str, Any], actor: Actor
    ) -> TenantRecord:
        if checked:
            with writing(self._engine) as connection:
                result = connection.execute(
                    update(tenants).where(tenants.c.name == name).values(dict(checked))
                )
                if result.rowcount:
                    record(
                        connection,
                        action,
                        at=self._now(),
                        actor=actor,
                        tenant=name,
                        subject=name,
                        detail=checked,
                    )
        return self.tenant(name)


def _tenant_record(row: Row[Any]) -> TenantRecord:
    return TenantRecord(
        name=row.name,
        created_at=row.created_at,
        default_prefix=row.default_prefix,
        quota=Quota.of(row),
        weight=row.weight,
        kv_reuse=row.kv_reuse,
    )
