"""Scopes and keys, the principal of a request, and the actor of an audit entry."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from prefixd.server.tenants.quotas import Quota

OPERATOR_TENANT = "operator"
"""Admin keys of this tenant see and change every tenant. It is created at the first start."""


class Scope(StrEnum):
    """Rights of a key: read, generate, change prefixes and bindings, administer its tenant."""

    READ = "read"
    GENERATE = "generate"
    WRITE = "write"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.READ, Scope.GENERATE, Scope.WRITE})


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request: tenant and scopes of its key, and the tenant's quota and settings
    (see ``TenantSettings``)."""

    tenant: str
    key_id: str
    scopes: frozenset[Scope]
    quota: Quota = field(default_factory=Quota)
    weight: float = 1.0
    kv_reuse: bool = True

    @property
    def is_operator(self) -> bool:
        """Whether this key administers the server rather than one tenant."""
        return self.tenant == OPERATOR_TENANT and Scope.ADMIN in self.scopes


@dataclass(frozen=True, slots=True)
class Actor:
    """The caller of a change, for the audit log; all None is the command line."""

    tenant: str | None = None
    key_id: str | None = None
    request_id: str | None = None


COMMAND_LINE = Actor()


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as listed: everything but the secret. ``replaced_by`` names its successor."""

    key_id: str
    tenant: str
    label: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    replaced_by: str | None = None

    def state(self, now: datetime) -> str:
        """``active``, ``replaced`` (valid until its overlap ends), ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active" if self.replaced_by is None else "replaced"


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key. ``text`` is the secret, which is not stored."""

    text: str = field(repr=False)
    record: KeyRecord
