"""Tenants, their API keys, and who a key is. The only file that reads or writes those tables."""

import hmac
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from prefix_store.database import reading, writing
from server.errors import BadRequest, Conflict, NotAuthenticated, NotFound
from server.tenants import keys
from server.tenants.tables import api_keys, tenants

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[^\x00-\x1f\x7f]{0,128}")
# Compared with when the key id is unknown, so that both ways do the same work.
_NO_DIGEST = "0" * 64


class Scope(StrEnum):
    """What a key may do: look, generate, change prefixes, administer the server."""

    READ = "read"
    GENERATE = "generate"
    WRITE = "write"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.READ, Scope.GENERATE, Scope.WRITE})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request: the tenant a key belongs to, and what the key may do."""

    tenant: str
    key_id: str
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant as listed."""

    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as listed: everything but the secret."""

    key_id: str
    tenant: str
    label: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key just made. ``text`` is the secret and cannot be had again."""

    text: str = field(repr=False)
    record: KeyRecord


def _now() -> datetime:
    return datetime.now(UTC)


class Tenants:
    """Blocking calls on the catalog; safe to share between threads.

    Nothing is cached: a revoked key stops at its next request, on every replica.
    """

    def __init__(self, engine: Engine, *, now: Callable[[], datetime] = _now) -> None:
        self._engine = engine
        self._now = now

    def create_tenant(self, name: str) -> TenantRecord:
        """Add a tenant. Raises BadRequest for a malformed name, Conflict for one that exists."""
        if _TENANT.fullmatch(name) is None:
            raise BadRequest(
                "a tenant name must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or "
                f"digit; got {name[:80]!a}",
                param="name",
            )
        record = TenantRecord(name=name, created_at=self._now())
        try:
            with writing(self._engine) as connection:
                connection.execute(
                    insert(tenants).values(name=record.name, created_at=record.created_at)
                )
        except IntegrityError as error:
            raise Conflict(f"tenant '{name}' already exists", param="name") from error
        return record

    def list_tenants(self) -> list[TenantRecord]:
        """All tenants, by name."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(tenants).order_by(tenants.c.name))
            return [TenantRecord(name=row.name, created_at=row.created_at) for row in rows]

    def create_key(
        self,
        *,
        tenant: str,
        scopes: Iterable[Scope] = DEFAULT_SCOPES,
        label: str = "",
        expires_at: datetime | None = None,
    ) -> IssuedKey:
        """Issue a key. Raises NotFound for an unknown tenant, BadRequest for no scope at all."""
        wanted = frozenset(scopes)
        if not wanted:
            raise BadRequest("a key needs at least one scope", param="scopes")
        if _LABEL.fullmatch(label) is None:
            raise BadRequest(
                "a label must be at most 128 printable characters; "
                f"got {len(label)} characters or a control character",
                param="label",
            )
        new = keys.generate()
        record = KeyRecord(
            key_id=new.parsed.key_id,
            tenant=tenant,
            label=label,
            scopes=tuple(scope for scope in Scope if scope in wanted),
            created_at=self._now(),
            expires_at=expires_at,
            revoked_at=None,
        )
        with writing(self._engine) as connection:
            known = select(tenants.c.name).where(tenants.c.name == tenant)
            if connection.execute(known).first() is None:
                raise NotFound(f"there is no tenant '{tenant}'", param="tenant")
            connection.execute(
                insert(api_keys).values(
                    key_id=record.key_id,
                    tenant=tenant,
                    label=label,
                    digest=new.parsed.digest,
                    scopes=" ".join(record.scopes),
                    created_at=record.created_at,
                    expires_at=expires_at,
                )
            )
        return IssuedKey(text=new.text, record=record)

    def list_keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """Keys of one tenant, or of all, oldest first."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.key_id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with reading(self._engine) as connection:
            return [_key_record(row) for row in connection.execute(query)]

    def revoke_key(self, key_id: str) -> KeyRecord:
        """Stop a key for good; revoking it again changes nothing. Raises NotFound."""
        with writing(self._engine) as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=self._now())
            )
            row = connection.execute(select(api_keys).where(api_keys.c.key_id == key_id)).first()
        if row is None:
            raise NotFound(f"there is no key '{key_id}'", param="key_id")
        return _key_record(row)

    def authenticate(self, text: str) -> Principal:
        """Who the key is. Raises NotAuthenticated with one message for every reason."""
        parsed = keys.parse(text)
        if parsed is None:
            raise _refused()
        query = select(api_keys).where(api_keys.c.key_id == parsed.key_id)
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        stored = _NO_DIGEST if row is None else row.digest
        matches = hmac.compare_digest(stored, parsed.digest)
        if row is None or not matches:
            raise _refused()
        expired = row.expires_at is not None and row.expires_at <= self._now()
        if expired or row.revoked_at is not None:
            raise _refused()
        return Principal(
            tenant=row.tenant, key_id=row.key_id, scopes=frozenset(_scopes(row.scopes))
        )


def _refused() -> NotAuthenticated:
    return NotAuthenticated(
        "the API key is not valid: unknown, malformed, expired or revoked", param=None
    )


def _scopes(text: str) -> tuple[Scope, ...]:
    return tuple(Scope(word) for word in text.split())


def _key_record(row: Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(
        key_id=row.key_id,
        tenant=row.tenant,
        label=row.label,
        scopes=_scopes(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
