"""Prefixes of a tenant's end users: bindings, and the tenant's default."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    and_,
    delete,
    func,
    select,
    update,
)

from prefixd.server.errors import NotFound
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.tables import bindings, tenants
from prefixd.server.tenants.usage import check_quota
from prefixd.server.tenants.users import check_user
from prefixd.store.catalog.changes import Precondition, unconditional
from prefixd.store.db.database import reading, upsert, utc_now, writing

Check = Callable[[Connection], object]
BindingHook = Callable[[Connection, "Binding"], object]
DefaultHook = Callable[[Connection, "DefaultPrefix"], object]
"""Runs at the end of the transaction of a change, with what it wrote."""


class ChosenBy(StrEnum):
    """How a request's prefix was chosen: by its `model`, by its `prefix`, by its user's binding, or
    by default."""

    MODEL = "model"
    PREFIX = "prefix"
    USER = "user"
    DEFAULT = "default"


def _no_check(_: Connection) -> None:
    """References that the caller knows to be good."""


def _nothing(*_: object) -> None:
    """The hook of a change that stores no response."""


@dataclass(frozen=True, slots=True)
class Binding:
    """An end user and the prefix reference that is resolved at each of the user's requests."""

    user: str
    prefix: str
    updated_at: datetime
    revision: int = 1


@dataclass(frozen=True, slots=True)
class DefaultPrefix:
    """The prefix reference of users without a binding."""

    prefix: str
    revision: int


class Bindings:
    """Blocking calls on the catalog; safe to share between threads. Finding a user's binding is one
    lookup of the primary key, for any number of users.

    References are stored as text, to be resolved at each request. The caller checks them with
    ``check``, which runs first in the transaction; what it raises rolls the change back.
    """

    def __init__(self, engine: Engine, *, now: Callable[[], datetime] = utc_now) -> None:
        self._engine = engine
        self._now = now

    def chosen(self, tenant: str, user: str) -> tuple[str, ChosenBy] | None:
        """The reference for a request by ``user``: bound, else the default, else None."""
        with reading(self._engine) as connection:
            bound = connection.execute(
                select(bindings.c.reference).where(
                    bindings.c.tenant == tenant, bindings.c.user_id == check_user(user)
                )
            ).scalar()
            if bound is not None:
                return bound, ChosenBy.USER
            default = connection.execute(
                select(tenants.c.default_prefix).where(tenants.c.name == tenant)
            ).scalar()
        return None if default is None else (default, ChosenBy.DEFAULT)

    def get(self, tenant: str, user: str) -> Binding:
        """The binding of one user. Raises BadRequest, NotFound."""
        query = select(bindings).where(
            bindings.c.tenant == tenant, bindings.c.user_id == check_user(user)
        )
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        if row is None:
            raise _unbound()
        return _binding(row)

    def page(
        self, tenant: str, *, limit: int, after: str | None = None
    ) -> tuple[list[Binding], str | None]:
        """Bindings by user, and the value of ``after`` for more."""
        query = select(bindings).where(bindings.c.tenant == tenant)
        if after is not None:
            query = query.where(bindings.c.user_id > after)
        query = query.order_by(bindings.c.user_id).limit(limit + 1)
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        page = [_binding(row) for row in rows[:limit]]
        return page, page[-1].user if len(rows) > limit else None

    def bind(
        self,
        tenant: str,
        user: str,
        reference: str,
        *,
        actor: Actor,
        check: Check = _no_check,
        precondition: Precondition = unconditional,
        at_end: BindingHook = _nothing,
    ) -> Binding:
        """Bind ``user`` to ``reference`` from the next request on. Raises BadRequest,
        QuotaExceeded for a user that was not bound."""
        now, of_user = self._now(), _is(tenant, check_user(user))
        with writing(self._engine) as connection:
            check(connection)
            revision = _next_revision(connection, tenant).last_revision
            current = connection.execute(select(bindings.c.revision).where(of_user)).scalars()
            precondition(current.all())
            binding = Binding(user, reference, now, revision)
            _put(connection, tenant, [binding])
            record(
                connection,
                Action.BINDING_SET,
                at=now,
                actor=actor,
                tenant=tenant,
                subject=user,
                detail={"prefix": reference},
            )
            at_end(connection, binding)
        return binding

    def bind_many(
        self, tenant: str, pairs: Sequence[tuple[str, str]], *, check: Check = _no_check
    ) -> None:
        """Bind users to references, in one transaction; the last binding of a user counts.
        Raises BadRequest, QuotaExceeded. The caller writes the audit entry of the whole import."""
        now, references = self._now(), {check_user(user): ref for user, ref in pairs}
        if not references:
            return
        with writing(self._engine) as connection:
            check(connection)
            revision = _next_revision(connection, tenant).last_revision
            written = [Binding(user, ref, now, revision) for user, ref in references.items()]
            _put(connection, tenant, written)

    def note_import(
        self, tenant: str, count: int, *, actor: Actor, at_end: Check = _nothing
    ) -> None:
        """The audit entry of an import, and what ``at_end`` writes in its transaction."""
        with writing(self._engine) as connection:
            record(
                connection,
                Action.BINDINGS_IMPORT,
                at=self._now(),
                actor=actor,
                tenant=tenant,
                subject="",
                detail={"count": count},
            )
            at_end(connection)

    def unbind(
        self, tenant: str, user: str, *, actor: Actor, precondition: Precondition = unconditional
    ) -> None:
        """Delete a binding. Raises BadRequest, NotFound."""
        of_user = _is(tenant, check_user(user))
        with writing(self._engine) as connection:
            _next_revision(connection, tenant)
            removed = delete(bindings).where(of_user).returning(bindings.c.revision)
            revision = connection.execute(removed).scalar()
            if revision is None:
                raise _unbound()
            precondition((revision,))
            record(
                connection,
                Action.BINDING_REMOVE,
                at=self._now(),
                actor=actor,
                tenant=tenant,
                subject=user,
            )

    def default(self, tenant: str) -> DefaultPrefix:
        """The reference of users without a binding. Raises NotFound."""
        query = select(tenants.c.default_prefix, tenants.c.default_revision)
        with reading(self._engine) as connection:
            row = connection.execute(query.where(tenants.c.name == tenant)).first()
        if row is None or row.default_prefix is None:
            raise _no_default()
        return DefaultPrefix(row.default_prefix, row.default_revision)

    def set_default(
        self,
        tenant: str,
        reference: str,
        *,
        actor: Actor,
        check: Check = _no_check,
        precondition: Precondition = unconditional,
        at_end: DefaultHook = _nothing,
    ) -> DefaultPrefix:
        """Set the default."""
        with writing(self._engine) as connection:
            check(connection)
            before = _next_revision(connection, tenant)
            precondition(() if before.default_prefix is None else (before.default_revision,))
            default = DefaultPrefix(reference, before.last_revision)
            self._write_default(connection, tenant, reference, before.last_revision, actor=actor)
            at_end(connection, default)
        return default

    def remove_default(
        self, tenant: str, *, actor: Actor, precondition: Precondition = unconditional
    ) -> None:
        """Remove the default. Raises NotFound when there is none."""
        with writing(self._engine) as connection:
            before = _next_revision(connection, tenant)
            if before.default_prefix is None:
                raise _no_default()
            precondition((before.default_revision,))
            self._write_default(connection, tenant, None, before.last_revision, actor=actor)

    def _write_default(
        self,
        connection: Connection,
        tenant: str,
        reference: str | None,
        revision: int,
        *,
        actor: Actor,
    ) -> None:
        values = {"default_prefix": reference, "default_revision": revision}
        connection.execute(update(tenants).where(tenants.c.name == tenant).values(values))
        record(
            connection,
            Action.DEFAULT_REMOVE if reference is None else Action.DEFAULT_SET,
            at=self._now(),
            actor=actor,
            tenant=tenant,
            subject=reference or "",
        )


def _next_revision(connection: Connection, tenant: str) -> Row[Any]:
    """Count one more write to a tenant's bindings and default. The row of the tenant, locked until
    the end of the transaction, has the new ``last_revision`` and the present default."""
    statement = (
        update(tenants)
        .where(tenants.c.name == tenant)
        .values(last_revision=tenants.c.last_revision + 1)
        .returning(tenants.c.last_revision, tenants.c.default_prefix, tenants.c.default_revision)
    )
    return connection.execute(statement).one()


def _is(tenant: str, user: str) -> ColumnElement[bool]:
    return and_(bindings.c.tenant == tenant, bindings.c.user_id == user)


def _binding(row: Row[Any]) -> Binding:
    return Binding(row.user_id, row.reference, row.updated_at, row.revision)


def _put(connection: Connection, tenant: str, written: Sequence[Binding]) -> None:
    """Write bindings of different users, within the tenant's quota. Raises QuotaExceeded."""
    rows = [
        {
            "tenant": tenant,
            "user_id": binding.user,
            "reference": binding.prefix,
            "updated_at": binding.updated_at,
            "revision": binding.revision,
        }
        for binding in written
    ]
    users = [binding.user for binding in written]
    known = select(func.count()).where(bindings.c.tenant == tenant, bindings.c.user_id.in_(users))
    num_known = connection.execute(known.select_from(bindings)).scalar_one()
    columns = ("reference", "updated_at", "revision")
    connection.execute(upsert(connection, bindings, update=columns), rows)
    check_quota(connection, tenant, {"max_users": len(rows) - num_known})


def _unbound() -> NotFound:
    return NotFound("this user is bound to no prefix", code="binding_not_found", param="user")


def _no_default() -> NotFound:
    return NotFound("the tenant has no default prefix", code="default_not_found")
