"""The catalog: names, versions and aliases in SQL. Every method is one transaction.

Every statement begins with the tenant: there is no way to ask for a thing without its owner.

Rows are locked in one order, so that writers wait for each other and never deadlock: the row of
the prefix, then those of blobs by digest, then whatever ``within`` locks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Engine, delete, insert, select, update

from prefix_store.artifact import Summary
from prefix_store.blob_rows import claim, release
from prefix_store.database import insert_into, reading, writing
from prefix_store.digest import BlobKey
from prefix_store.errors import UnknownPrefix
from prefix_store.manifest import Manifest, Page, Published
from prefix_store.names import LATEST, Reference
from prefix_store.rows import manifests, one_version, referenced, rows
from prefix_store.tables import aliases, prefixes, versions

WithinPublish = Callable[[Connection, Published], None]
WithinAlias = Callable[[Connection, Manifest], None]
Within = Callable[[Connection, None], None]
"""Called in the writing transaction when all is written, before it commits: to write something
more that must hold together with it. What it raises rolls everything back."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A version that has everything but its number."""

    summary: Summary
    digest: str
    size_bytes: int
    fingerprint: str
    metadata_json: str
    creator: str | None
    created_at: datetime


class Catalog:
    """Names of all tenants, on one engine; safe from several threads and processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def publish(
        self, draft: Draft, *, tenant: str, name: str, within: WithinPublish | None = None
    ) -> Published:
        """Give the draft's bytes a version under ``name`` and point ``latest`` at it.

        The same bytes for the same base keep the version they have, with its first metadata.
        Raises BlobCollected when the blob's row is gone, and with it perhaps the blob.
        """
        with writing(self._engine) as connection:
            prefix_id, next_version = _prefix_for_writing(connection, tenant, name)
            claim(connection, BlobKey(tenant, draft.digest))
            found = connection.execute(
                select(versions.c.version).where(
                    versions.c.prefix_id == prefix_id,
                    versions.c.digest == draft.digest,
                    versions.c.fingerprint == draft.fingerprint,
                )
            ).scalar()
            version = next_version if found is None else found
            if found is None:
                _insert_version(connection, draft, prefix_id, tenant=tenant, version=version)
            connection.execute(
                update(prefixes)
                .where(prefixes.c.id == prefix_id)
                .values(latest_version=version, next_version=max(next_version, version + 1))
            )
            (manifest,) = manifests(connection, one_version(tenant, name, version))
            published = Published(manifest, created=found is None)
            if within is not None:
                within(connection, published)
            return published

    def resolve(self, reference: Reference, *, tenant: str) -> Manifest:
        """The version a reference means now; raise UnknownPrefix."""
        with reading(self._engine) as connection:
            found = manifests(connection, referenced(tenant, reference))
        if not found:
            raise UnknownPrefix(_unknown(reference))
        return found[0]

    def versions(self, *, tenant: str, name: str) -> tuple[Manifest, ...]:
        """All versions under a name, newest first; raise UnknownPrefix."""
        statement = rows(tenant).where(prefixes.c.name == name)
        with reading(self._engine) as connection:
            found = manifests(connection, statement.order_by(versions.c.version.desc()))
        if not found:
            raise UnknownPrefix(_unknown(Reference(name)))
        return found

    def page(self, *, tenant: str, limit: int, after: str | None) -> Page:
        """The latest version of each name after ``after``, in the order of names."""
        statement = (
            rows(tenant)
            .where(versions.c.version == prefixes.c.latest_version)
            .order_by(prefixes.c.name)
            .limit(limit + 1)
        )
        if after is not None:
            statement = statement.where(prefixes.c.name > after)
        with reading(self._engine) as connection:
            found = manifests(connection, statement)
        more = len(found) > limit
        return Page(found[:limit], next_after=found[limit - 1].name if more else None)

    def set_alias(
        self,
        *,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        within: WithinAlias | None = None,
    ) -> Manifest:
        """Point an alias at a version, from wherever it pointed; raise UnknownPrefix."""
        with writing(self._engine) as connection:
            prefix_id = _locked(connection, tenant, name)
            statement = one_version(tenant, name, version)
            if prefix_id is None or connection.execute(statement).first() is None:
                raise UnknownPrefix(_unknown(Reference(name, alias=None, version=version)))
            moved = insert_into(connection, aliases).values(
                prefix_id=prefix_id, alias=alias, version=version
            )
            connection.execute(
                moved.on_conflict_do_update(
                    index_elements=["prefix_id", "alias"], set_={"version": version}
                )
            )
            manifest = manifests(connection, statement)[0]
            if within is not None:
                within(connection, manifest)
            return manifest

    def remove_alias(
        self, *, tenant: str, name: str, alias: str, within: Within | None = None
    ) -> None:
        """Forget an alias; its version stays. Raise UnknownPrefix."""
        with writing(self._engine) as connection:
            prefix_id = _locked(connection, tenant, name)
            removed = connection.execute(
                delete(aliases).where(aliases.c.prefix_id == prefix_id, aliases.c.alias == alias)
            )
            if removed.rowcount == 0:
                raise UnknownPrefix(_unknown(Reference(name, alias=alias)))
            if within is not None:
                within(connection, None)

    def delete(self, *, tenant: str, name: str, now: datetime, within: Within | None = None) -> int:
        """Forget all versions and aliases of a name; how many versions. Raise UnknownPrefix.

        The row stays, so that version numbers go on from where they were. The blobs stay too,
        known as unreferenced from ``now`` where no other name has them.
        """
        with writing(self._engine) as connection:
            prefix_id = _locked(connection, tenant, name)
            ours = versions.c.prefix_id == prefix_id
            digests = connection.execute(select(versions.c.digest).where(ours)).scalars().all()
            if not digests:
                raise UnknownPrefix(_unknown(Reference(name)))
            connection.execute(delete(aliases).where(aliases.c.prefix_id == prefix_id))
            removed = connection.execute(delete(versions).where(ours))
            connection.execute(
                update(prefixes).where(prefixes.c.id == prefix_id).values(latest_version=None)
            )
            release(connection, tenant, digests, now=now)
            if within is not None:
                within(connection, None)
            return removed.rowcount


def _locked(connection: Connection, tenant: str, name: str) -> int | None:
    """Row id of a name, locked; None when it never was."""
    return connection.execute(
        select(prefixes.c.id)
        .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        .with_for_update()
    ).scalar()


def _prefix_for_writing(connection: Connection, tenant: str, name: str) -> tuple[int, int]:
    """Row id and next version number of a name, locked; made when there is none."""
    made = insert_into(connection, prefixes).values(tenant=tenant, name=name, next_version=1)
    statement = (
        select(prefixes.c.id, prefixes.c.next_version)
        .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        .with_for_update()
    )
    row = connection.execute(statement).first()
    if row is None:
        connection.execute(made.on_conflict_do_nothing(index_elements=["tenant", "name"]))
        row = connection.execute(statement).one()
    return row.id, row.next_version


def _insert_version(
    connection: Connection, draft: Draft, prefix_id: int, *, tenant: str, version: int
) -> None:
    summary = draft.summary
    connection.execute(
        insert(versions).values(
            prefix_id=prefix_id,
            version=version,
            tenant=tenant,
            digest=draft.digest,
            fingerprint=draft.fingerprint,
            kind=str(summary.kind),
            peft_type=summary.peft_type,
            num_virtual_tokens=summary.num_virtual_tokens,
            dtype=summary.dtype,
            size_bytes=draft.size_bytes,
            base_model_name_or_path=summary.base_model_name_or_path,
            metadata_json=draft.metadata_json,
            creator=draft.creator,
            created_at=draft.created_at,
        )
    )


def _unknown(reference: Reference) -> str:
    """The same words for what does not exist and for what is another tenant's."""
    selector = reference.version if reference.version is not None else reference.alias
    shown = reference.name if selector == LATEST else f"{reference.name}@{selector}"
    return f"no prefix {shown}"
