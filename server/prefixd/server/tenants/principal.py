"""Who asks and who acts: scopes, principals, and the actor an audit entry names."""

from dataclasses import dataclass, field
from enum import StrEnum

from prefixd.server.tenants.quotas import Quota

OPERATOR_TENANT = "operator"
"""Admin keys of this tenant see and change every tenant. The first start makes it."""


class Scope(StrEnum):
    """What a key may do: look, generate, change prefixes and bindings, administer its tenant."""

    READ = "read"
    GENERATE = "generate"
    WRITE = "write"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.READ, Scope.GENERATE, Scope.WRITE})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request: the tenant a key belongs to, what the key may do, and how much; how
    the tenant is treated beside others (``TenantSettings`` says how)."""

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
    """Who changes something, for the audit log; all None is the command line."""

    tenant: str | None = None
    key_id: str | None = None
    request_id: str | None = None


COMMAND_LINE = Actor()
