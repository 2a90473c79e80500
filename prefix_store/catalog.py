"""The catalog: names, versions and aliases in SQL. Every method is one transaction.

Every statement begins with the tenant: there is no way to ask for a thing without its owner.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, and_, delete, insert, select, update

from prefix_store.artifact import Kind, Summary
from prefix_store.database import reading, writing
from prefix_store.errors import UnknownPrefix
from prefix_store.manifest import Manifest, Page, Published
from prefix_store.names import LATEST, MAX_VERSION, Reference
from prefix_store.tables import aliases, prefixes, versions


class Catalog:
    """Names of all tenants, on one engine; safe from several threads and processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def publish(
        self,
        summary: Summary,
        *,
        tenant: str,
        name: str,
        digest: str,
        size_bytes: int,
        fingerprint: str,
        metadata_json: str,
        now: datetime,
    ) -> Published:
        """Give the bytes ``digest`` a version under ``name`` and point ``latest`` at it.

        The same bytes for the same base keep the version they have, with its first metadata.
        """
        with writing(self._engine) as connection:
            prefix_id, next_version = _prefix_for_writing(connection, tenant, name)
            found = connection.execute(
                select(versions.c.version).where(
                    versions.c.prefix_id == prefix_id,
                    versions.c.digest == digest,
                    versions.c.fingerprint == fingerprint,
                )
            ).scalar()
            version = next_version if found is None else found
            if found is None:
                connection.execute(
                    insert(versions).values(
                        prefix_id=prefix_id,
                        version=version,
                        tenant=tenant,
                        digest=digest,
                        fingerprint=fingerprint,
                        kind=str(summary.kind),
                        peft_type=summary.peft_type,
                        num_virtual_tokens=summary.num_virtual_tokens,
                        dtype=summary.dtype,
                        size_bytes=size_bytes,
                        base_model_name_or_path=summary.base_model_name_or_path,
                        metadata_json=metadata_json,
                        created_at=now,
                    )
                )
            connection.execute(
                update(prefixes)
                .where(prefixes.c.id == prefix_id)
                .values(latest_version=version, next_version=max(next_version, version + 1))
            )
            (manifest,) = _manifests(connection, _one_version(tenant, name, version))
            return Published(manifest, created=found is None)

    def resolve(self, reference: Reference, *, tenant: str) -> Manifest:
        """The version a reference means now; raise UnknownPrefix."""
        with reading(self._engine) as connection:
            found = _manifests(connection, _referenced(tenant, reference))
        if not found:
            raise UnknownPrefix(_unknown(reference))
        return found[0]

    def versions(self, *, tenant: str, name: str) -> tuple[Manifest, ...]:
        """All versions under a name, newest first; raise UnknownPrefix."""
        statement = _rows(tenant).where(prefixes.c.name == name)
        with reading(self._engine) as connection:
            found = _manifests(connection, statement.order_by(versions.c.version.desc()))
        if not found:
            raise UnknownPrefix(_unknown(Reference(name)))
        return found

    def page(self, *, tenant: str, limit: int, after: str | None) -> Page:
        """The latest version of each name after ``after``, in the order of names."""
        statement = (
            _rows(tenant)
            .where(versions.c.version == prefixes.c.latest_version)
            .order_by(prefixes.c.name)
            .limit(limit + 1)
        )
        if after is not None:
            statement = statement.where(prefixes.c.name > after)
        with reading(self._engine) as connection:
            found = _manifests(connection, statement)
        more = len(found) > limit
        return Page(found[:limit], next_after=found[limit - 1].name if more else None)

    def set_alias(self, *, tenant: str, name: str, alias: str, version: int) -> Manifest:
        """Point an alias at a version, from wherever it pointed; raise UnknownPrefix."""
        with writing(self._engine) as connection:
            statement = _one_version(tenant, name, version)
            target = connection.execute(statement).first()
            if target is None:
                raise UnknownPrefix(_unknown(Reference(name, alias=None, version=version)))
            key = and_(aliases.c.prefix_id == target.prefix_id, aliases.c.alias == alias)
            connection.execute(delete(aliases).where(key))
            connection.execute(
                insert(aliases).values(prefix_id=target.prefix_id, alias=alias, version=version)
            )
            return _manifests(connection, statement)[0]

    def remove_alias(self, *, tenant: str, name: str, alias: str) -> None:
        """Forget an alias; its version stays. Raise UnknownPrefix."""
        owner = select(prefixes.c.id).where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        with writing(self._engine) as connection:
            removed = connection.execute(
                delete(aliases).where(
                    aliases.c.prefix_id == owner.scalar_subquery(), aliases.c.alias == alias
                )
            )
            if removed.rowcount == 0:
                raise UnknownPrefix(_unknown(Reference(name, alias=alias)))

    def delete(self, *, tenant: str, name: str) -> int:
        """Forget all versions and aliases of a name; how many versions. Raise UnknownPrefix.

        The row stays, so that version numbers go on from where they were.
        """
        with writing(self._engine) as connection:
            prefix_id = connection.execute(
                select(prefixes.c.id)
                .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
                .where(prefixes.c.latest_version.is_not(None))
                .with_for_update()
            ).scalar()
            if prefix_id is None:
                raise UnknownPrefix(_unknown(Reference(name)))
            connection.execute(delete(aliases).where(aliases.c.prefix_id == prefix_id))
            removed = connection.execute(delete(versions).where(versions.c.prefix_id == prefix_id))
            connection.execute(
                update(prefixes).where(prefixes.c.id == prefix_id).values(latest_version=None)
            )
            return removed.rowcount


def _prefix_for_writing(connection: Connection, tenant: str, name: str) -> tuple[int, int]:
    """Row id and next version number of a name, locked; made when there is none."""
    row = connection.execute(
        select(prefixes.c.id, prefixes.c.next_version)
        .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        .with_for_update()
    ).first()
    if row is not None:
        return row.id, row.next_version
    made = connection.execute(insert(prefixes).values(tenant=tenant, name=name, next_version=1))
    (prefix_id,) = made.inserted_primary_key or (None,)
    if not isinstance(prefix_id, int):
        raise TypeError("the database gave no key for a new prefix")
    return prefix_id, 1


def _rows(tenant: str) -> Select[Any]:
    return (
        select(prefixes.c.name, prefixes.c.latest_version, versions)
        .join_from(prefixes, versions, versions.c.prefix_id == prefixes.c.id)
        .where(prefixes.c.tenant == tenant)
    )


def _one_version(tenant: str, name: str, version: int) -> Select[Any]:
    # A number beyond the column is no version; the driver would raise on it.
    known = version if 0 <= version <= MAX_VERSION else 0
    return _rows(tenant).where(prefixes.c.name == name, versions.c.version == known)


def _referenced(tenant: str, reference: Reference) -> Select[Any]:
    if reference.version is not None:
        return _one_version(tenant, reference.name, reference.version)
    statement = _rows(tenant).where(prefixes.c.name == reference.name)
    if reference.alias == LATEST:
        return statement.where(versions.c.version == prefixes.c.latest_version)
    return statement.join(
        aliases,
        and_(
            aliases.c.prefix_id == versions.c.prefix_id,
            aliases.c.version == versions.c.version,
            aliases.c.alias == reference.alias,
        ),
    )


def _manifests(connection: Connection, statement: Select[Any]) -> tuple[Manifest, ...]:
    rows = connection.execute(statement).all()
    names = _alias_names(connection, {row.prefix_id for row in rows})
    return tuple(
        _manifest(row, aliases_of=names.get((row.prefix_id, row.version), ())) for row in rows
    )


def _alias_names(
    connection: Connection, prefix_ids: set[int]
) -> dict[tuple[int, int], tuple[str, ...]]:
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for row in connection.execute(select(aliases).where(aliases.c.prefix_id.in_(prefix_ids))):
        key = (row.prefix_id, row.version)
        found[key] = (*found.get(key, ()), row.alias)
    return found


def _manifest(row: Row[Any], *, aliases_of: Iterable[str]) -> Manifest:
    latest = (LATEST,) if row.version == row.latest_version else ()
    return Manifest(
        tenant=row.tenant,
        name=row.name,
        version=row.version,
        digest=row.digest,
        kind=Kind(row.kind),
        peft_type=row.peft_type,
        num_virtual_tokens=row.num_virtual_tokens,
        dtype=row.dtype,
        size_bytes=row.size_bytes,
        fingerprint=row.fingerprint,
        created_at=row.created_at,
        base_model_name_or_path=row.base_model_name_or_path,
        metadata=json.loads(row.metadata_json),
        aliases=tuple(sorted((*latest, *aliases_of))),
    )


def _unknown(reference: Reference) -> str:
    """The same words for what does not exist and for what is another tenant's."""
    selector = reference.version if reference.version is not None else reference.alias
    shown = reference.name if selector == LATEST else f"{reference.name}@{selector}"
    return f"no prefix {shown}"
