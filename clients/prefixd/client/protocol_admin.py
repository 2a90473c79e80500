"""The protocol of administration, for keys with the scope ``admin``: tenants, keys, the audit log.
As ``prefixd.client.protocol``, without I/O."""

from collections.abc import Mapping, Sequence

from prefixd.client.answers import Response, body_of
from prefixd.client.protocol import Call, Request, request_of
from prefixd.client.types_admin import AuditEntry, AuditPage, Key, KeyPage, Tenant, TenantPage
from prefixd.client.wire import maybe, objects

_ADMIN = ("v1", "admin")

# ── Tenants ──────────────────────────────────────────────────────────────────────────────────


def list_tenants(*, limit: int | None = None, after: str | None = None) -> Call[TenantPage]:
    """The tenants this key administers, by name, a page at a time."""
    return Call(_listing("tenants", limit=limit, after=after), _tenant_page)


def create_tenant(
    name: str,
    *,
    weight: float | None = None,
    kv_reuse: bool | None = None,
    quota: Mapping[str, int | None] | None = None,
) -> Call[Tenant]:
    """Add a tenant. For the operator's keys."""
    body = _given(name=name, weight=weight, kv_reuse=kv_reuse, quota=quota)
    return Call(request_of("POST", *_ADMIN, "tenants", json=body), _tenant)


def show_tenant(name: str) -> Call[Tenant]:
    """One tenant, its settings and limits."""
    return Call(request_of("GET", *_ADMIN, "tenants", name), _tenant)


def set_tenant(
    name: str, *, weight: float | None = None, kv_reuse: bool | None = None
) -> Call[Tenant]:
    """Change how a tenant is treated beside others. For the operator's keys."""
    body = _given(weight=weight, kv_reuse=kv_reuse)
    return Call(request_of("PATCH", *_ADMIN, "tenants", name, json=body), _tenant)


def set_quota(name: str, limits: Mapping[str, int | None]) -> Call[Tenant]:
    """Change the limits that are named; None lifts one. For the operator's keys."""
    return Call(request_of("PATCH", *_ADMIN, "tenants", name, "quota", json=limits), _tenant)


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────


def list_keys(
    *, tenant: str | None = None, limit: int | None = None, after: str | None = None
) -> Call[KeyPage]:
    """Keys without their secrets, oldest first, a page at a time."""
    return Call(_listing("keys", tenant=tenant, limit=limit, after=after), _key_page)


def create_key(
    *,
    tenant: str | None = None,
    scopes: Sequence[str] | None = None,
    label: str | None = None,
    expires_in_seconds: float | None = None,
) -> Call[Key]:
    """Issue a key; its ``secret`` is in the answer, this once. The operator may name a tenant."""
    body = _given(
        tenant=tenant,
        scopes=None if scopes is None else list(scopes),
        label=label,
        expires_in_seconds=expires_in_seconds,
    )
    return Call(request_of("POST", *_ADMIN, "keys", json=body), _key)


def rotate_key(key_id: str, *, overlap_seconds: float | None = None) -> Call[Key]:
    """Issue a successor; the old key stays good for the overlap (a day unless given)."""
    body = _given(overlap_seconds=overlap_seconds)
    return Call(request_of("POST", *_ADMIN, "keys", key_id, "rotate", json=body), _key)


def revoke_key(key_id: str) -> Call[Key]:
    """Stop a key at its next request, for good."""
    return Call(request_of("DELETE", *_ADMIN, "keys", key_id), _key)


# ── The audit log ────────────────────────────────────────────────────────────────────────────


def read_audit(
    *, tenant: str | None = None, limit: int | None = None, before: int | None = None
) -> Call[AuditPage]:
    """What was done, newest first, a page at a time."""
    return Call(_listing("audit", tenant=tenant, limit=limit, before=before), _audit_page)


def _listing(what: str, **asked: str | int | None) -> Request:
    params = {name: value for name, value in asked.items() if value is not None}
    return request_of("GET", *_ADMIN, what, params=params)


def _given(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _tenant(response: Response) -> Tenant:
    return Tenant.from_wire(body_of(response))


def _tenant_page(response: Response) -> TenantPage:
    body = body_of(response)
    found = tuple(Tenant.from_wire(one) for one in objects(body, "data"))
    return TenantPage(found, maybe(body, "next_after", str))


def _key(response: Response) -> Key:
    return Key.from_wire(body_of(response))


def _key_page(response: Response) -> KeyPage:
    body = body_of(response)
    found = tuple(Key.from_wire(one) for one in objects(body, "data"))
    return KeyPage(found, maybe(body, "next_after", str))


def _audit_page(response: Response) -> AuditPage:
    body = body_of(response)
    found = tuple(AuditEntry.from_wire(one) for one in objects(body, "data"))
    return AuditPage(found, maybe(body, "next_before", int))
