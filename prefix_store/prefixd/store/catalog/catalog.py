"""The catalog: names, versions and aliases in SQL. Every method is one transaction.

Every statement begins with the tenant: there is no way to ask for a thing without its owner.

Rows are locked in one order, so that writers wait for each other and never deadlock: the row of
the prefix, then those of blobs by digest, then all pins, then whatever ``within`` locks.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection, Engine, delete, select, update

from prefixd.store.catalog.blob_rows import claim, release
from prefixd.store.catalog.drafts import Draft, insert_version, locked, prefix_for_writing
from prefixd.store.catalog.pins import (
    Change,
    Pinned,
    digests_of,
    drop_pin,
    orphans,
    pinned,
    pinned_version,
    put_pin,
)
from prefixd.store.catalog.queries import manifests, one_version, referenced, rows
from prefixd.store.catalog.tables import aliases, prefixes, versions
from prefixd.store.db.database import insert_into, reading, writing
from prefixd.store.digest import BlobKey
from prefixd.store.errors import UnknownPrefix
from prefixd.store.manifest import Manifest, Page, Published
from prefixd.store.names import LATEST, Reference

Watch = Callable[[Change], None]
"""Called after a change that left something behind was committed."""

WithinPublish = Callable[[Connection, Published], None]
WithinVersion = Callable[[Connection, Manifest], None]
Within = Callable[[Connection, None], None]
"""Called in the writing transaction when all is written, before it commits: to write something
more that must hold together with it. What it raises rolls everything back."""


class Catalog:
    """Names of all tenants, on one engine; safe from several threads and processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.watch: Watch = _nobody

    def publish(
        self, draft: Draft, *, tenant: str, name: str, within: WithinPublish | None = None
    ) -> Published:
        """Give the draft's bytes a version under ``name`` and point ``latest`` at it.

        The same bytes for the same base keep the version they have, with its first metadata.
        Raises BlobCollected when a collection came to the blob since it was wanted.
        """
        with writing(self._engine) as connection:
            prefix_id, next_version, latest = prefix_for_writing(connection, tenant, name)
            claim(connection, BlobKey(tenant, draft.digest), ticket=draft.ticket)
            found = connection.execute(
                select(versions.c.version).where(
                    versions.c.prefix_id == prefix_id,
                    versions.c.digest == draft.digest,
                    versions.c.fingerprint == draft.fingerprint,
                )
            ).scalar()
            version = next_version if found is None else found
            if found is None:
                insert_version(connection, draft, prefix_id, tenant=tenant, version=version)
            connection.execute(
                update(prefixes)
                .where(prefixes.c.id == prefix_id)
                .values(latest_version=version, next_version=max(next_version, version + 1))
            )
            (manifest,) = manifests(connection, one_version(tenant, name, version))
            published = Published(manifest, created=found is None)
            left = self._left(connection, tenant, prefix_id, None if latest == version else latest)
            if within is not None:
                within(connection, published)
        self._tell(left)
        return published

    def resolve(self, reference: Reference, *, tenant: str) -> Manifest:
        """The version a reference means now; raise UnknownPrefix."""
        with reading(self._engine) as connection:
            found = manifests(connection, referenced(tenant, reference))
        if not found:
            raise UnknownPrefix(_unknown(reference))
        return found[0]

    def versions(
        self, *, tenant: str, name: str, limit: int | None, before: int | None
    ) -> tuple[Manifest, ...]:
        """Versions under a name, newest first: ``limit`` of those before the number ``before``;
        raise UnknownPrefix when the name has none at all."""
        everything = rows(tenant).where(prefixes.c.name == name)
        statement = everything.order_by(versions.c.version.desc()).limit(limit)
        if before is not None:
            statement = statement.where(versions.c.version < before)
        with reading(self._engine) as connection:
            found = manifests(connection, statement)
            if not found and connection.execute(everything.limit(1)).first() is None:
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
        within: WithinVersion | None = None,
    ) -> Manifest:
        """Point an alias at a version, from wherever it pointed; raise UnknownPrefix."""
        with writing(self._engine) as connection:
            prefix_id = locked(connection, tenant, name)
            statement = one_version(tenant, name, version)
            if prefix_id is None or connection.execute(statement).first() is None:
                raise UnknownPrefix(_unknown(Reference(name, alias=None, version=version)))
            before = connection.execute(
                select(aliases.c.version).where(
                    aliases.c.prefix_id == prefix_id, aliases.c.alias == alias
                )
            ).scalar()
            moved = insert_into(connection, aliases).values(
                prefix_id=prefix_id, alias=alias, version=version
            )
            connection.execute(
                moved.on_conflict_do_update(
                    index_elements=["prefix_id", "alias"], set_={"version": version}
                )
            )
            manifest = manifests(connection, statement)[0]
            left = self._left(connection, tenant, prefix_id, before)
            if within is not None:
                within(connection, manifest)
        self._tell(left)
        return manifest

    def remove_alias(
        self, *, tenant: str, name: str, alias: str, within: Within | None = None
    ) -> None:
        """Forget an alias; its version stays. Raise UnknownPrefix."""
        with writing(self._engine) as connection:
            prefix_id = locked(connection, tenant, name)
            removed = connection.execute(
                delete(aliases)
                .where(aliases.c.prefix_id == prefix_id, aliases.c.alias == alias)
                .returning(aliases.c.version)
            ).scalar()
            if prefix_id is None or removed is None:
                raise UnknownPrefix(_unknown(Reference(name, alias=alias)))
            left = self._left(connection, tenant, prefix_id, removed)
            if within is not None:
                within(connection, None)
        self._tell(left)

    def set_pin(
        self,
        *,
        tenant: str,
        reference: Reference,
        now: datetime,
        creator: str | None = None,
        within: WithinVersion | None = None,
    ) -> Manifest:
        """Pin the version a reference means now, in place of any other of its prefix; raise
        UnknownPrefix."""
        with writing(self._engine) as connection:
            prefix_id = locked(connection, tenant, reference.name)
            found = manifests(connection, referenced(tenant, reference))
            if prefix_id is None or not found:
                raise UnknownPrefix(_unknown(reference))
            before = pinned_version(connection, tenant, prefix_id)
            version = found[0].version
            put_pin(connection, tenant, prefix_id, version, since=now, pinned_by=creator)
            left = self._left(connection, tenant, prefix_id, before)
            manifest = replace(found[0], pinned=True)
            if within is not None:
                within(connection, manifest)
        self._tell(replace(left, pins=True))
        return manifest

    def remove_pin(self, *, tenant: str, name: str, within: Within | None = None) -> None:
        """Let a prefix go from residency as others do; raise UnknownPrefix when none is pinned."""
        with writing(self._engine) as connection:
            prefix_id = locked(connection, tenant, name)
            before = pinned_version(connection, tenant, prefix_id)
            if prefix_id is None or before is None:
                raise UnknownPrefix(f"no version of {name} is pinned")
            drop_pin(connection, tenant, prefix_id)
            left = self._left(connection, tenant, prefix_id, before)
            if within is not None:
                within(connection, None)
        self._tell(replace(left, pins=True))

    def pinned(self, *, fingerprint: str) -> tuple[Pinned, ...]:
        """What is pinned of the prefixes of one base, by all tenants, the oldest pin first."""
        with reading(self._engine) as connection:
            return pinned(connection, fingerprint=fingerprint)

    def delete(self, *, tenant: str, name: str, now: datetime, within: Within | None = None) -> int:
        """Forget all versions and aliases of a name; how many versions. Raise UnknownPrefix.

        The row stays, so that version numbers go on from where they were. The blobs stay too,
        known as unreferenced from ``now`` where no other name has them.
        """
        with writing(self._engine) as connection:
            prefix_id = locked(connection, tenant, name)
            ours = versions.c.prefix_id == prefix_id
            digests = connection.execute(select(versions.c.digest).where(ours)).scalars().all()
            if not digests:
                raise UnknownPrefix(_unknown(Reference(name)))
            connection.execute(delete(aliases).where(aliases.c.prefix_id == prefix_id))
            unpinned = drop_pin(connection, tenant, prefix_id)
            removed = connection.execute(delete(versions).where(ours))
            connection.execute(
                update(prefixes).where(prefixes.c.id == prefix_id).values(latest_version=None)
            )
            release(connection, tenant, digests, now=now)
            left = Change(orphans(connection, tenant, digests), pins=unpinned)
            if within is not None:
                within(connection, None)
        self._tell(left)
        return removed.rowcount

    def _left(
        self, connection: Connection, tenant: str, prefix_id: int, before: int | None
    ) -> Change:
        """What is left behind by that which meant the version ``before`` and now another."""
        if before is None:
            return Change()
        return Change(orphans(connection, tenant, digests_of(connection, prefix_id, [before])))

    def _tell(self, left: Change) -> None:
        if left != Change():
            self.watch(left)


def _nobody(_: Change) -> None:
    """Before somebody watches."""


def _unknown(reference: Reference) -> str:
    """The same words for what does not exist and for what is another tenant's."""
    selector = reference.version if reference.version is not None else reference.alias
    shown = reference.name if selector == LATEST else f"{reference.name}@{selector}"
    return f"no prefix {shown}"
