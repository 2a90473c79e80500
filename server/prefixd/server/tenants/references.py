"""Bindings and defaults that still refer to a version about to be deleted."""

from sqlalchemy import Connection, func, or_, select

from prefixd.server.errors import Conflict
from prefixd.server.tenants.tables import bindings, tenants
from prefixd.store.catalog.changes import Removed
from prefixd.store.names import LATEST, parse_reference


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
