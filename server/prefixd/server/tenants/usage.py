"""What a tenant has of each thing that is counted, and the check of its quotas in the transaction
of a change."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, Table, exists, func, or_, select

from prefixd.server.errors import QuotaExceeded
from prefixd.server.tenants.batch_state import ENDED
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.tables import (
    KEPT_FOR,
    api_keys,
    batches,
    bindings,
    idempotency_keys,
    tenants,
)
from prefixd.store.catalog.pins import pinned_tokens
from prefixd.store.catalog.tables import aliases, blobs, files, prefixes, versions
from prefixd.store.db.database import utc_now

LEAST_KEPT_BYTES = 64 * 1024 * 1024

_Count = Callable[[str, datetime], Select[Any]]


def _prefixes(tenant: str, _now: datetime) -> Select[Any]:
    has_version = exists().where(versions.c.prefix_id == prefixes.c.id)
    return _count_of(prefixes).where(prefixes.c.tenant == tenant, has_version)


def _versions(tenant: str, _now: datetime) -> Select[Any]:
    return _count_of(versions).where(versions.c.tenant == tenant)


def _aliases(tenant: str, _now: datetime) -> Select[Any]:
    rows = aliases.join(prefixes, prefixes.c.id == aliases.c.prefix_id)
    return _count_of(rows).where(prefixes.c.tenant == tenant)


def _bytes(tenant: str, _now: datetime) -> Select[Any]:
    return _bytes_of(versions, tenant)


def _bytes_of(table: Table, tenant: str) -> Select[Any]:
    """Of the blobs of versions or files, equal bytes counted once."""
    sizes = (
        select(table.c.digest, func.max(table.c.size_bytes).label("size"))
        .where(table.c.tenant == tenant)
        .group_by(table.c.digest)
        .subquery()
    )
    return select(func.coalesce(func.sum(sizes.c.size), 0))


def _names(tenant: str, _now: datetime) -> Select[Any]:
    return _count_of(prefixes).where(prefixes.c.tenant == tenant)


def _kept_bytes(tenant: str, _now: datetime) -> Select[Any]:
    return select(func.coalesce(func.sum(blobs.c.size_bytes), 0)).where(blobs.c.tenant == tenant)


def _users(tenant: str, _now: datetime) -> Select[Any]:
    return _count_of(bindings).where(bindings.c.tenant == tenant)


def _keys(tenant: str, now: datetime) -> Select[Any]:
    is_valid = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now)
    mine = api_keys.c.tenant == tenant
    return _count_of(api_keys).where(mine, api_keys.c.revoked_at.is_(None), is_valid)


def _idempotency_keys(tenant: str, now: datetime) -> Select[Any]:
    kept = idempotency_keys.c.created_at > now - KEPT_FOR
    return _count_of(idempotency_keys).where(idempotency_keys.c.tenant == tenant, kept)


def _files(tenant: str, _now: datetime) -> Select[Any]:
    return _count_of(files).where(files.c.tenant == tenant)


def _file_bytes(tenant: str, _now: datetime) -> Select[Any]:
    return select(func.coalesce(func.sum(files.c.size_bytes), 0)).where(files.c.tenant == tenant)


def _open_batches(tenant: str, _now: datetime) -> Select[Any]:
    is_open = batches.c.status.not_in(ENDED)
    return _count_of(batches).where(batches.c.tenant == tenant, is_open)


def _count_of(rows: Any) -> Select[Any]:
    return select(func.count()).select_from(rows)


_COUNTED: dict[str, tuple[_Count, str, str]] = {
    "max_prefixes": (_prefixes, "prefixes", "delete a prefix"),
    "max_versions": (_versions, "versions", "delete a version or a prefix"),
    "max_aliases": (_aliases, "aliases", "remove an alias"),
    "max_bytes": (_bytes, "stored bytes", "delete a version or a prefix"),
    "max_users": (_users, "bound users", "unbind a user"),
    "max_keys": (_keys, "valid keys", "revoke a key"),
    "max_idempotency_keys": (
        _idempotency_keys,
        "stored responses",
        "send no Idempotency-Key, or wait until those of today are 24 hours old",
    ),
    "max_files": (_files, "files", "delete a file"),
    "max_file_bytes": (_file_bytes, "bytes of files", "delete a file"),
    "max_open_batches": (
        _open_batches,
        "batches that have not ended",
        "wait until one ends, or cancel one",
    ),
}
"""How each quota is counted, the noun for it, and what makes room."""

_AT_MOST: dict[str, _Count] = {"max_prefixes": _names, "max_bytes": _kept_bytes}
"""Counts from one index that are never too low: with deleted names, with blobs of no version. Only
where one exceeds the quota is the exact count made, which reads every row of the tenant."""


def check_quota(
    connection: Connection, tenant: str, added: Mapping[str, int], *, now: datetime | None = None
) -> None:
    """Raise QuotaExceeded when the tenant has more than a quota allows, of what was ``added``.

    To be called at the end of the transaction that added it: it locks the tenant's row, so that
    the second of two concurrent changes counts what the first added. A quota of which nothing was
    added is not checked: a tenant over a lowered one can still replace what it has.
    """
    names = [name for name, amount in added.items() if amount > 0]
    if not names:
        return
    # Rows that refer to the tenant hold a share of its key: a full lock would deadlock with them.
    locked = select(tenants).where(tenants.c.name == tenant).with_for_update(key_share=True)
    row = connection.execute(locked).first()
    if row is None:  # prefixes may belong to a tenant that has no row
        return
    quota = Quota.of(row)
    for name in names:
        limit = getattr(quota, name)
        if limit is None:
            continue
        count, noun, remedy = _COUNTED[name]
        at = now or utc_now()
        at_most = _AT_MOST.get(name)
        if at_most is not None and connection.execute(at_most(tenant, at)).scalar_one() <= limit:
            continue
        used = connection.execute(count(tenant, at)).scalar_one()
        if used > limit:
            raise QuotaExceeded(
                f"the tenant may have {limit} {noun} ({name}): it has {used - added[name]}, and "
                f"{added[name]} more were requested; {remedy}, or ask the operator for a higher "
                "limit",
                param=name,
            )


def added_by_publish(connection: Connection, tenant: str, name: str, digest: str) -> dict[str, int]:
    """What the new version of ``name`` with the bytes of ``digest`` added, in its transaction."""
    mine = versions.c.tenant == tenant
    of_name = _count_of(versions.join(prefixes, prefixes.c.id == versions.c.prefix_id)).where(
        mine, prefixes.c.name == name
    )
    of_digest = select(func.count(), func.max(versions.c.size_bytes)).where(
        mine, versions.c.digest == digest
    )
    copies, size = connection.execute(of_digest).one()
    return {
        "max_prefixes": int(connection.execute(of_name).scalar_one() == 1),
        "max_versions": 1,
        "max_bytes": size if copies == 1 else 0,
    }


def check_kept(connection: Connection, tenant: str, quota: Quota) -> None:
    """Raise QuotaExceeded when blobs without a version or file leave no room: they may take as much
    as ``max_bytes`` again, and LEAST_KEPT_BYTES in any case.

    To be called before an upload is written: blobs of deleted versions and of refused uploads are
    kept until they are collected.
    """
    if quota.max_bytes is None:
        return
    total = connection.execute(_kept_bytes(tenant, utc_now())).scalar_one()
    room = quota.max_bytes + max(quota.max_bytes, LEAST_KEPT_BYTES)
    if total > room:  # exactly: without those of files
        total -= connection.execute(_bytes_of(files, tenant)).scalar_one()
    if total > room:
        raise QuotaExceeded(
            f"the tenant may store {room} bytes together with those of deleted versions and of "
            f"refused uploads, which are kept until they are collected (max_bytes): it has {total};"
            " try again later, or ask the operator for a higher limit",
            param="max_bytes",
        )


def used_by(connection: Connection, tenant: str, *, now: datetime) -> dict[str, int]:
    """What ``tenant`` has now, by the name of the quota that limits it."""
    used = {
        name: connection.execute(count(tenant, now)).scalar_one()
        for name, (count, _, _) in _COUNTED.items()
    }
    longest = select(func.max(versions.c.num_virtual_tokens)).where(versions.c.tenant == tenant)
    used["max_virtual_tokens"] = connection.execute(longest).scalar() or 0
    most_lines = select(func.max(batches.c.total)).where(batches.c.tenant == tenant)
    used["max_batch_lines"] = connection.execute(most_lines).scalar() or 0
    used["max_resident_tokens"] = pinned_tokens(connection, tenant)
    return used
