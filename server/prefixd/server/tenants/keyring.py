"""API keys: issuing, listing, rotating, revoking and authenticating them."""

import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, Row, bindparam, insert, select, tuple_, update

from prefixd.server.errors import BadRequest, Conflict, NotAuthenticated, NotFound
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.key_text import generate, parse
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
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.tables import api_keys, tenants
from prefixd.server.tenants.usage import check_quota
from prefixd.store.db.database import reading, single_reads, upsert, writing

LABEL = re.compile(r"[^\x00-\x1f\x7f]{0,128}")
# Compared with when the key id is unknown, so that both cases do the same work.
_NO_DIGEST = "0" * 64
# Every request reads it: to build it takes longer than to run it.
_PRINCIPAL = (
    select(api_keys, *(c for c in tenants.c if c.name not in api_keys.c))
    .join_from(api_keys, tenants)
    .where(api_keys.c.key_id == bindparam("key_id"))
)


KeyHook = Callable[[Connection, IssuedKey], object]
"""Runs at the end of the transaction that issues a key."""


def _nothing(*_: object) -> None:
    """The hook of a key for which no response is stored."""


class Keyring:
    """The part of ``Tenants`` for keys. ``owner`` restricts a call to one tenant's keys: another
    tenant's key then raises the same NotFound as a missing one."""

    def __init__(
        self, engine: Engine, *, now: Callable[[], datetime], default_quota: Quota
    ) -> None:
        self._engine = engine
        self._lookups = single_reads(engine)
        self._now = now
        self._default_quota = default_quota

    def create_key(
        self,
        *,
        tenant: str,
        scopes: Iterable[Scope] = DEFAULT_SCOPES,
        label: str = "",
        expires_at: datetime | None = None,
        actor: Actor = COMMAND_LINE,
        at_end: KeyHook = _nothing,
    ) -> IssuedKey:
        """Issue a key. The operator's tenant is made where it is missing. Raises NotFound for
        another tenant that does not exist, BadRequest without scopes, QuotaExceeded."""
        granted = frozenset(scopes)
        if not granted:
            raise BadRequest("expected at least one scope; received none", param="scopes")
        if LABEL.fullmatch(label) is None:
            raise BadRequest(
                "expected a label of at most 128 printable characters; "
                f"received {len(label)} characters or a control character",
                param="label",
            )
        with writing(self._engine) as connection:
            known = select(tenants.c.name).where(tenants.c.name == tenant)
            if tenant == OPERATOR_TENANT:
                self._make_operator(connection, actor)
            elif connection.execute(known).first() is None:
                raise NotFound(
                    f"no tenant {tenant[:80]!a}: create it first, such as with `prefixd tenant "
                    "create`",
                    param="tenant",
                )
            issued = self._issue(connection, tenant, granted, label=label, expires_at=expires_at)
            check_quota(connection, tenant, {"max_keys": 1}, now=self._now())
            self._audit(connection, Action.KEY_CREATE, issued.record, actor)
            at_end(connection, issued)
        return issued

    def bootstrap(self) -> IssuedKey | None:
        """The operator's first key, with every scope; None when the catalog has ever had a key.

        Of several processes that start at once, one receives it.
        """
        with writing(self._engine) as connection:
            self._make_operator(connection, COMMAND_LINE)
            locked = select(tenants.c.name).where(tenants.c.name == OPERATOR_TENANT)
            connection.execute(locked.with_for_update())
            if connection.execute(select(api_keys.c.key_id).limit(1)).first() is not None:
                return None
            issued = self._issue(
                connection, OPERATOR_TENANT, frozenset(Scope), label="bootstrap", expires_at=None
            )
            self._audit(connection, Action.KEY_CREATE, issued.record, COMMAND_LINE)
        return issued

    def _make_operator(self, connection: Connection, actor: Actor) -> None:
        """Add the operator's tenant, unless it exists."""
        now = self._now()
        row = {"name": OPERATOR_TENANT, "created_at": now, **asdict(self._default_quota)}
        statement: Any = upsert(connection, tenants, update=())
        added = connection.execute(statement.values(row).returning(tenants.c.name))
        if added.first() is not None:
            record(
                connection,
                Action.TENANT_CREATE,
                at=now,
                actor=actor,
                tenant=OPERATOR_TENANT,
                subject=OPERATOR_TENANT,
            )

    def list_keys(
        self, tenant: str | None = None, *, limit: int | None = None, after: str | None = None
    ) -> list[KeyRecord]:
        """Keys of one tenant, or of all, oldest first, at most ``limit`` after the id ``after``."""
        place = tuple_(api_keys.c.created_at, api_keys.c.key_id)
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.key_id).limit(limit)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with reading(self._engine) as connection:
            if after is not None:
                last = connection.execute(_one_key(after, tenant)).first()
                if last is None:
                    return []
                query = query.where(place > (last.created_at, last.key_id))
            return [_key_record(row) for row in connection.execute(query)]

    def rotate_key(
        self,
        key_id: str,
        *,
        overlap: timedelta,
        owner: str | None = None,
        actor: Actor = COMMAND_LINE,
        at_end: KeyHook = _nothing,
    ) -> IssuedKey:
        """Issue a successor with the same scopes, label and lifetime; the old key stays valid for
        ``overlap``. Raises NotFound, Conflict for a key that is not active."""
        if overlap < timedelta(0):
            raise BadRequest("expected an overlap from 0 seconds", param="overlap_seconds")
        with writing(self._engine) as connection:
            row = connection.execute(_one_key(key_id, owner).with_for_update()).first()
            if row is None:
                raise _no_key(key_id)
            old, now = _key_record(row), self._now()
            if old.state(now) != "active":
                raise Conflict(f"key '{key_id}' is {old.state(now)} and cannot be rotated")
            lifetime = None if old.expires_at is None else old.expires_at - old.created_at
            issued = self._issue(
                connection,
                old.tenant,
                frozenset(old.scopes),
                label=old.label,
                expires_at=None if lifetime is None else now + lifetime,
            )
            ends = now + overlap if old.expires_at is None else min(old.expires_at, now + overlap)
            connection.execute(
                update(api_keys)
                .where(api_keys.c.key_id == key_id)
                .values(expires_at=ends, replaced_by=issued.record.key_id)
            )
            detail = {"replaced_by": issued.record.key_id, "good_until": ends.isoformat()}
            self._audit(connection, Action.KEY_ROTATE, old, actor, detail)
            at_end(connection, issued)
        return issued

    def revoke_key(
        self, key_id: str, *, owner: str | None = None, actor: Actor = COMMAND_LINE
    ) -> KeyRecord:
        """Revoke a key permanently; revoking it again changes nothing. Raises NotFound."""
        with writing(self._engine) as connection:
            row = connection.execute(_one_key(key_id, owner).with_for_update()).first()
            if row is None:
                raise _no_key(key_id)
            if row.revoked_at is None:
                key = api_keys.c.key_id == key_id
                connection.execute(update(api_keys).where(key).values(revoked_at=self._now()))
                self._audit(connection, Action.KEY_REVOKE, _key_record(row), actor)
                row = connection.execute(_one_key(key_id, owner)).one()
            return _key_record(row)

    def authenticate(self, text: str) -> Principal:
        """The principal of a key. Raises NotAuthenticated, with one message for every reason."""
        parsed = parse(text)
        if parsed is None:
            raise _refused()
        with self._lookups.connect() as connection:
            row = connection.execute(_PRINCIPAL, {"key_id": parsed.key_id}).first()
        stored = _NO_DIGEST if row is None else row.digest
        matches = hmac.compare_digest(stored, parsed.digest)
        if row is None or not matches:
            raise _refused()
        expired = row.expires_at is not None and row.expires_at <= self._now()
        if expired or row.revoked_at is not None:
            raise _refused()
        return _principal(row)

    def principal(self, key_id: str) -> Principal:
        """The principal of a key by its id, for what it began; that of its successor when it was
        replaced and has expired. Raises NotAuthenticated."""
        with self._lookups.connect() as connection:
            row = connection.execute(_PRINCIPAL, {"key_id": key_id}).first()
            while row is not None and row.revoked_at is None:
                if row.expires_at is None or row.expires_at > self._now():
                    return _principal(row)
                row = connection.execute(_PRINCIPAL, {"key_id": row.replaced_by}).first()
        raise NotAuthenticated(
            f"the key '{key_id}' is not valid any more: it was revoked or has expired"
        )

    def _issue(
        self,
        connection: Connection,
        tenant: str,
        scopes: frozenset[Scope],
        *,
        label: str,
        expires_at: datetime | None,
    ) -> IssuedKey:
        new = generate()
        key = KeyRecord(
            key_id=new.parsed.key_id,
            tenant=tenant,
            label=label,
            scopes=tuple(scope for scope in Scope if scope in scopes),
            created_at=self._now(),
            expires_at=expires_at,
            revoked_at=None,
        )
        row = {**asdict(key), "scopes": " ".join(key.scopes), "digest": new.parsed.digest}
        connection.execute(insert(api_keys).values(row))
        return IssuedKey(text=new.text, record=key)

    def _audit(
        self,
        connection: Connection,
        action: Action,
        key: KeyRecord,
        actor: Actor,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        about = {"label": key.label, "scopes": list(key.scopes), **(detail or {})}
        record(
            connection,
            action,
            at=self._now(),
            actor=actor,
            tenant=key.tenant,
            subject=key.key_id,
            detail=about,
        )


def _principal(row: Row[Any]) -> Principal:
    return Principal(
        tenant=row.tenant,
        key_id=row.key_id,
        scopes=frozenset(map(Scope, row.scopes.split())),
        quota=Quota.of(row),
        weight=row.weight,
        kv_reuse=row.kv_reuse,
    )


def _one_key(key_id: str, owner: str | None) -> Any:
    query = select(api_keys).where(api_keys.c.key_id == key_id)
    return query if owner is None else query.where(api_keys.c.tenant == owner)


def _no_key(key_id: str) -> NotFound:
    return NotFound(f"there is no key {key_id[:80]!a}", param="key_id")


def _refused() -> NotAuthenticated:
    return NotAuthenticated(
        "the API key is not valid: unknown, malformed, expired or revoked", param=None
    )


def _key_record(row: Row[Any]) -> KeyRecord:
    columns = {field.name: getattr(row, field.name) for field in fields(KeyRecord)}
    return KeyRecord(**columns | {"scopes": tuple(map(Scope, row.scopes.split()))})
