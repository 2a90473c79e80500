"""Prefixes of a tenant's end users: bindings, and the tenant's default."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import Connection, Engine, delete, func, or_, select, update

from prefixd.server.errors import Conflict, NotFound
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.tables import bindings, tenants
from prefixd.server.tenants.usage import check_quota
from prefixd.server.tenants.users import check_user
from prefixd.store.catalog.changes import Removed
from prefixd.store.db.database import reading, upsert, utc_now, writing
from prefixd.store.names import LATEST, parse_reference

Check = Callable[[Connection], object]


class ChosenBy(StrEnum):
    """How a request's prefix was chosen: by its `model`, by its user's binding, or by default."""

    MODEL = "model"
    USER = "user"
    DEFAULT = "default"


def _no_check(_: Connection) -> None:
    """References that the caller knows to be good."""


@dataclass(frozen=True, slots=True)
class Binding:
    """An end user and the prefix reference that is resolved at each of the user's requests."""

    user: str
    prefix: str
    updated_at: datetime


def check_unbound(connection: Connection, removed: Removed) -> None:
    """Raise Conflict while a binding or the tenant's default refers to a version that this
    transaction deleted: by its number, or by the bare name when that means nothing any more."""
    tenant, name = removed.manifest.tenant, removed.manifest.name
    column = bindings.c.reference
    stored = select(column).where(
        bindings.c.tenant == tenant,
        or_(column == name, column.startswith(f"{name}@", autoescape=True)),
    )
    for reference in connection.execute(stored.distinct().order_by(column)).scalars():
        if _refers_to(reference, removed):
            users = select(func.min(bindings.c.user_id), func.count()).where(
                bindings.c.tenant == tenant, column == reference
            )
            user, count = connection.execute(users).one()
            who = f"the user {user!a} is" if count == 1 else f"{count} users, such as {user!a}, are"
            raise _in_use(removed, f"{who} bound to {reference}")
    default = connection.execute(
        select(tenants.c.default_prefix).where(tenants.c.name == tenant)
    ).scalar()
    if default is not None and _refers_to(default, removed):
        raise _in_use(removed, f"the tenant's default prefix is {default}")


def _refers_to(reference: str, removed: Removed) -> bool:
    parsed, manifest = parse_reference(reference), removed.manifest
    if parsed.name != manifest.name:
        return False
    return parsed.version == manifest.version or (removed.ends_name and parsed.alias == LATEST)


def _in_use(removed: Removed, what: str) -> Conflict:
    manifest = removed.manifest
    return Conflict(
        f"{manifest.name}@{manifest.version} is in use: {what}; change that first",
        code="version_in_use",
    )


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
        return Binding(row.user_id, row.reference, row.updated_at)

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
        page = [Binding(row.user_id, row.reference, row.updated_at) for row in rows[:limit]]
        return page, page[-1].user if len(rows) > limit else None

    def bind(
        self, tenant: str, user: str, reference: str, *, actor: Actor, check: Check = _no_check
    ) -> Binding:
        """Bind ``user`` to ``reference`` from the next request on. Raises BadRequest,
        QuotaExceeded for a user that was not bound."""
        binding = Binding(check_user(user), reference, self._now())
        with writing(self._engine) as connection:
            check(connection)
            row = _row(tenant, user, reference, binding.updated_at)
            _put(connection, tenant, [row])
            record(
                connection,
                Action.BINDING_SET,
                at=binding.updated_at,
                actor=actor,
                tenant=tenant,
                subject=user,
                detail={"prefix": reference},
            )
        return binding

    def bind_many(
        self, tenant: str, pairs: Sequence[tuple[str, str]], *, check: Check = _no_check
    ) -> None:
        """Bind users to references, in one transaction; the last binding of a user counts.
        Raises BadRequest, QuotaExceeded. The caller writes the audit entry of the whole import."""
        now = self._now()
        rows = [_row(tenant, check_user(user), ref, now) for user, ref in dict(pairs).items()]
        if rows:
            with writing(self._engine) as connection:
                check(connection)
                _put(connection, tenant, rows)

    def note_import(self, tenant: str, count: int, *, actor: Actor) -> None:
        """The audit entry of an import."""
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

    def unbind(self, tenant: str, user: str, *, actor: Actor) -> None:
        """Delete a binding. Raises BadRequest, NotFound."""
        with writing(self._engine) as connection:
            result = connection.execute(
                delete(bindings).where(
                    bindings.c.tenant == tenant, bindings.c.user_id == check_user(user)
                )
            )
            if result.rowcount == 0:
                raise _unbound()
            record(
                connection,
                Action.BINDING_REMOVE,
                at=self._now(),
                actor=actor,
                tenant=tenant,
                subject=user,
            )

    def default(self, tenant: str) -> str:
        """The reference of users without a binding. Raises NotFound."""
        query = select(tenants.c.default_prefix).where(tenants.c.name == tenant)
        with reading(self._engine) as connection:
            reference = connection.execute(query).scalar()
        if reference is None:
            raise _no_default()
        return str(reference)

    def set_default(
        self, tenant: str, reference: str | None, *, actor: Actor, check: Check = _no_check
    ) -> None:
        """Set the default, or with None remove it. Raises NotFound when there is none to remove."""
        with writing(self._engine) as connection:
            check(connection)
            statement = update(tenants).where(tenants.c.name == tenant)
            if reference is None:
                statement = statement.where(tenants.c.default_prefix.is_not(None))
            result = connection.execute(statement.values(default_prefix=reference))
            if result.rowcount == 0:
                raise _no_default()
            record(
                connection,
                Action.DEFAULT_REMOVE if reference is None else Action.DEFAULT_SET,
                at=self._now(),
                actor=actor,
                tenant=tenant,
                subject="" if reference is None else reference,
            )


def _row(tenant: str, user: str, reference: str, now: datetime) -> dict[str, str | datetime]:
    return {"tenant": tenant, "user_id": user, "reference": reference, "updated_at": now}


def _put(connection: Connection, tenant: str, rows: list[dict[str, str | datetime]]) -> None:
    """Write bindings of different users, within the tenant's quota. Raises QuotaExceeded."""
    users = [row["user_id"] for row in rows]
    known = select(func.count()).where(bindings.c.tenant == tenant, bindings.c.user_id.in_(users))
    num_known = connection.execute(known.select_from(bindings)).scalar_one()
    connection.execute(upsert(connection, bindings, update=("reference", "updated_at")), rows)
    check_quota(connection, tenant, {"max_users": len(rows) - num_known})


def _unbound() -> NotFound:
    return NotFound("this user is bound to no prefix", code="binding_not_found", param="user")


def _no_default() -> NotFound:
    return NotFound("the tenant has no default prefix", code="default_not_found")
