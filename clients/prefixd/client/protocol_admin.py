"""The protocol of administration, for keys with the scope ``admin``: tenants, keys, the audit log.

As ``prefixd.client.protocol``, without I/O.
"""

from collections.abc import Mapping, Sequence

from prefixd.client.types import AuditPage, Key, KeyPage, Tenant, TenantPage
from prefixd.client.wire import Call, Repeat, creating, parser, request_of

_ADMIN = ("v1", "admin")

# ── Tenants ──────────────────────────────────────────────────────────────────────────────────


def list_tenants(*, limit: int | None = None, after: str | None = None) -> Call[TenantPage]:
    """The tenants that this key administers, by name, a page at a time."""
    params = {"limit": limit, "after": after}
    return Call(request_of("GET", *_ADMIN, "tenants", params=params), parser(TenantPage))


def create_tenant(
    name: str,
    *,
    weight: float | None = None,
    kv_reuse: bool | None = None,
    quota: Mapping[str, int | None] | None = None,
) -> Call[Tenant]:
    """Add a tenant. For the operator's keys."""
    body = _without_none(name=name, weight=weight, kv_reuse=kv_reuse, quota=quota)
    return creating(Call(request_of("POST", *_ADMIN, "tenants", json=body), parser(Tenant)))


def show_tenant(name: str) -> Call[Tenant]:
    """One tenant, its settings and limits, and what it has of each."""
    return Call(request_of("GET", *_ADMIN, "tenants", name), parser(Tenant))


def set_tenant(
    name: str, *, weight: float | None = None, kv_reuse: bool | None = None
) -> Call[Tenant]:
    """Change a tenant's weight in the fair queue and its KV reuse. For the operator's keys."""
    body = _without_none(weight=weight, kv_reuse=kv_reuse)
    return Call(request_of("PATCH", *_ADMIN, "tenants", name, json=body), parser(Tenant))


def set_quota(name: str, limits: Mapping[str, int | None]) -> Call[Tenant]:
    """Change the limits in ``limits``; None removes one. For the operator's keys."""
    return Call(request_of("PATCH", *_ADMIN, "tenants", name, "quota", json=limits), parser(Tenant))


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────


def list_keys(
    *, tenant: str | None = None, limit: int | None = None, after: str | None = None
) -> Call[KeyPage]:
    """Keys without their secrets, oldest first, a page at a time."""
    params = {"tenant": tenant, "limit": limit, "after": after}
    return Call(request_of("GET", *_ADMIN, "keys", params=params), parser(KeyPage))


def create_key(
    *,
    tenant: str | None = None,
    scopes: Sequence[str] | None = None,
    label: str | None = None,
    expires_in_seconds: float | None = None,
) -> Call[Key]:
    """Issue a key; no later response has its ``secret``. The operator may name a tenant.

    Not sent again when the response was lost, and the secret with it: ``list_keys`` finds the key
    to revoke.
    """
    body = _without_none(
        tenant=tenant,
        scopes=None if scopes is None else list(scopes),
        label=label,
        expires_in_seconds=expires_in_seconds,
    )
    call = Call(request_of("POST", *_ADMIN, "keys", json=body), parser(Key))
    return creating(call, repeat=Repeat.REFUSED)


def rotate_key(key_id: str, *, overlap_seconds: float | None = None) -> Call[Key]:
    """Issue a successor; the old key stays valid for the overlap (by default a day). Sent again as
    ``create_key`` is."""
    body = _without_none(overlap_seconds=overlap_seconds)
    call = Call(request_of("POST", *_ADMIN, "keys", key_id, "rotate", json=body), parser(Key))
    return creating(call, repeat=Repeat.REFUSED)


def revoke_key(key_id: str) -> Call[Key]:
    """Revoke a key: the server refuses its next request."""
    return Call(request_of("DELETE", *_ADMIN, "keys", key_id), parser(Key))


# ── The audit log ────────────────────────────────────────────────────────────────────────────


def read_audit(
    *, tenant: str | None = None, limit: int | None = None, before: int | None = None
) -> Call[AuditPage]:
    """Entries of the audit log, newest first, a page at a time."""
    params = {"tenant": tenant, "limit": limit, "before": before}
    return Call(request_of("GET", *_ADMIN, "audit", params=params), parser(AuditPage))


def _without_none(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}
