"""Changes to the catalog, as units of work: one transaction on the names of one tenant.

Rows are locked in one order, so that writers wait for each other and never deadlock: the row of
the prefix, then those of blobs by digest, then all pins, then the rows that the caller's own
statements lock.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, delete, insert, select, update

from prefixd.store.artifact.config import BaseSpec
from prefixd.store.catalog.alias_rows import highest_left, point, replace_latest
from prefixd.store.catalog.blob_rows import claim, release
from prefixd.store.catalog.changes import Change, Draft, Published, Removed
from prefixd.store.catalog.manifests import Manifest, check_base, find, numbered, unknown
from prefixd.store.catalog.pins import drop_pin, orphans, pinned_version, put_pin
from prefixd.store.catalog.tables import aliases, latest_versions, prefixes, versions
from prefixd.store.catalog.version_rows import merge_metadata, replace_metadata
from prefixd.store.db.database import insert_into
from prefixd.store.errors import UnknownPrefix, VersionInUse
from prefixd.store.names import (
    LATEST,
    BlobKey,
    Reference,
    check_alias,
    check_name,
    parse_reference,
    selected,
)


@dataclass(slots=True)
class CatalogTransaction:
    """Changes of one tenant's prefixes, in one transaction; see ``PrefixStore.change``.

    Statements on ``connection`` belong to the same transaction. Another tenant's prefix and a
    missing one raise the same UnknownPrefix, a malformed name InvalidReference.
    """

    connection: Connection
    _tenant: str
    _now: datetime
    _unnamed: set[str] = field(default_factory=set)  # digests that lost a name, alias or pin
    _pins_changed: bool = False
    num_aliases_added: int = 0

    def publish(self, draft: Draft, *, name: str) -> Published:
        """Give the draft's bytes a version under ``name`` and point the ``latest`` of its base at
        it.

        The same bytes for the same base keep the version they have; the draft may replace its
        metadata. Raises BlobCollected when a collection removed the blob since it was wanted, and
        ArtifactRefused for metadata that names another task or base than the version's.
        """
        prefix_id, next_version = self._lock_or_create(name)
        claim(self.connection, BlobKey(self._tenant, draft.packed.digest), ticket=draft.ticket)
        existing = self.connection.execute(
            select(versions.c.version).where(
                versions.c.prefix_id == prefix_id,
                versions.c.digest == draft.packed.digest,
                versions.c.fingerprint == draft.base.fingerprint,
            )
        ).scalar()
        version = next_version if existing is None else existing
        metadata_changed = False
        if existing is None:
            self._insert_version(draft, prefix_id, version)
        else:
            self._name_base(prefix_id, version, draft.base)
            if draft.replaces_metadata:
                metadata = json.loads(draft.metadata_json)
                metadata_changed = replace_metadata(self.connection, prefix_id, version, metadata)
        self._point(latest_versions.c.fingerprint, draft.base.fingerprint, prefix_id, version)
        manifest = numbered(self.connection, self._tenant, name, version)
        return Published(manifest, created=existing is None, metadata_changed=metadata_changed)

    def merge_metadata(
        self, name: str, version: int | str, patch: Mapping[str, Any], *, base: BaseSpec
    ) -> Manifest:
        """Merge ``patch`` into the metadata of a version, by RFC 7396: null removes a field.

        ``version`` is as for ``set_alias``. Raises ArtifactRefused.
        """
        reference = selected(name, version)
        prefix_id = self._lock(name, missing=unknown(reference))
        number = find(self.connection, self._tenant, reference, base=base).version
        merge_metadata(self.connection, prefix_id, number, patch)
        return numbered(self.connection, self._tenant, name, number)

    def set_alias(self, name: str, alias: str, *, version: int | str, base: BaseSpec) -> Manifest:
        """Point ``alias`` at a version, from any other one, and return that version.

        ``version`` is a number, or an alias of the name: then it is the version that this one means
        now for ``base``, the served one, and ``alias`` does not follow when it moves. ``latest``
        takes any version of ``base``, until the next publish moves it again; it raises BaseMismatch
        for a version of another base.
        """
        if alias != LATEST:
            check_alias(alias)
        reference = selected(name, version)
        prefix_id = self._lock(name, missing=unknown(reference))
        # Raises before the alias of a missing version is set.
        manifest = find(self.connection, self._tenant, reference, base=base)
        if alias == LATEST:
            check_base(manifest, base)
            key, value = latest_versions.c.fingerprint, base.fingerprint
        else:
            key, value = aliases.c.alias, alias
        self._point(key, value, prefix_id, manifest.version)
        return numbered(self.connection, self._tenant, name, manifest.version)

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove ``alias``; its version stays."""
        missing = unknown(Reference(check_name(name), alias=check_alias(alias)))
        prefix_id = self._lock(name, missing=missing)
        removed = self.connection.execute(
            delete(aliases)
            .where(aliases.c.prefix_id == prefix_id, aliases.c.alias == alias)
            .returning(aliases.c.version)
        ).scalar()
        if removed is None:
            raise UnknownPrefix(missing)
        self._note_unnamed(prefix_id, removed)

    def set_pin(self, reference: str, *, base: BaseSpec, creator: str | None = None) -> Manifest:
        """Pin the version a reference means now, in place of any other of its prefix: servers keep
        it resident until it is unpinned."""
        parsed = parse_reference(reference)
        prefix_id = self._lock(parsed.name, missing=unknown(parsed))
        manifest = find(self.connection, self._tenant, parsed, base=base)
        before = pinned_version(self.connection, self._tenant, prefix_id)
        pin = {"since": self._now, "pinned_by": creator}
        put_pin(self.connection, self._tenant, prefix_id, manifest.version, **pin)
        self._note_unnamed(prefix_id, before)
        self._pins_changed = True
        return replace(manifest, pinned=True)

    def remove_pin(self, name: str) -> None:
        """Unpin a prefix; raise UnknownPrefix when no version of it is pinned."""
        missing = f"no version of {check_name(name)} is pinned"
        prefix_id = self._lock(name, missing=missing)
        before = pinned_version(self.connection, self._tenant, prefix_id)
        if before is None:
            raise UnknownPrefix(missing)
        drop_pin(self.connection, self._tenant, prefix_id)
        self._note_unnamed(prefix_id, before)
        self._pins_changed = True

    def delete(self, name: str) -> int:
        """Remove a name with its versions, aliases and pin; the number of versions.

        The row stays, so that version numbers are not used again. The blobs stay until they are
        collected, recorded as unreferenced where no other name has them.
        """
        missing = unknown(Reference(check_name(name)))
        prefix_id = self._lock(name, missing=missing)
        in_prefix = versions.c.prefix_id == prefix_id
        selected = select(versions.c.digest).where(in_prefix)
        digests = self.connection.execute(selected).scalars().all()
        if not digests:
            raise UnknownPrefix(missing)
        for table in (aliases, latest_versions):
            self.connection.execute(delete(table).where(table.c.prefix_id == prefix_id))
        if drop_pin(self.connection, self._tenant, prefix_id):
            self._pins_changed = True
        removed = self.connection.execute(delete(versions).where(in_prefix))
        release(self.connection, self._tenant, digests, now=self._now)
        self._unnamed.update(digests)
        return removed.rowcount

    def delete_version(self, name: str, version: int, *, base: BaseSpec) -> Removed:
        """Remove one version. The ``latest`` of its base, if it was that, becomes the highest
        version left of that base; without any version the name is gone, as after ``delete``.

        ``base`` is the served one. Raises VersionInUse while an alias or the pin refers to it. The
        caller checks in this transaction what else refers to it: the name stays locked until then.
        """
        missing = unknown(Reference(check_name(name), alias=None, version=version))
        prefix_id = self._lock(name, missing=missing)
        manifest = numbered(self.connection, self._tenant, name, version)
        self._check_unused(manifest)
        tx, fingerprint = self.connection, manifest.fingerprint
        highest = highest_left(tx, prefix_id, without=version, fingerprint=fingerprint)
        ends_name = highest is None and (
            fingerprint == base.fingerprint or highest_left(tx, prefix_id, without=version) is None
        )
        if LATEST in manifest.aliases:
            replace_latest(tx, prefix_id, fingerprint, highest)
        tx.execute(
            delete(versions).where(versions.c.prefix_id == prefix_id, versions.c.version == version)
        )
        release(tx, self._tenant, [manifest.digest], now=self._now)
        self._unnamed.add(manifest.digest)
        return Removed(manifest, ends_name=ends_name)

    def change(self) -> Change:
        """The effect so far; to be read before the commit."""
        if not self._unnamed:
            return Change(pins=self._pins_changed)
        keys = orphans(self.connection, self._tenant, self._unnamed)
        return Change(keys, pins=self._pins_changed)

    def _check_unused(self, manifest: Manifest) -> None:
        shown = f"{manifest.name}@{manifest.version} is in use"
        for alias in manifest.aliases:
            if alias != LATEST:
                raise VersionInUse(
                    f"{shown}: the alias '{alias}' refers to it; move or delete the alias first"
                )
        if manifest.pinned:
            raise VersionInUse(f"{shown}: it is pinned; unpin {manifest.name} first")

    def _lock(self, name: str, *, missing: str) -> int:
        """Row id of a name, locked; raise UnknownPrefix(missing) when there never was one."""
        prefix_id: int | None = self.connection.execute(
            select(prefixes.c.id)
            .where(prefixes.c.tenant == self._tenant, prefixes.c.name == name)
            .with_for_update()
        ).scalar()
        if prefix_id is None:
            raise UnknownPrefix(missing)
        return prefix_id

    def _lock_or_create(self, name: str) -> tuple[int, int]:
        """Row id and next version number of a name, locked."""
        statement = (
            select(prefixes.c.id, prefixes.c.next_version)
            .where(prefixes.c.tenant == self._tenant, prefixes.c.name == name)
            .with_for_update()
        )
        row = self.connection.execute(statement).first()
        if row is None:
            first = {"tenant": self._tenant, "name": name, "next_version": 1}
            created = insert_into(self.connection, prefixes).values(first)
            self.connection.execute(
                created.on_conflict_do_nothing(index_elements=["tenant", "name"])
            )
            row = self.connection.execute(statement).one()
        return row.id, row.next_version

    def _insert_version(self, draft: Draft, prefix_id: int, version: int) -> None:
        summary = draft.summary
        self.connection.execute(
            update(prefixes).where(prefixes.c.id == prefix_id).values(next_version=version + 1)
        )
        self.connection.execute(
            insert(versions).values(
                prefix_id=prefix_id,
                version=version,
                tenant=self._tenant,
                digest=draft.packed.digest,
                fingerprint=draft.base.fingerprint,
                base=draft.base.name,
                kind=str(summary.kind),
                peft_type=summary.peft_type,
                num_virtual_tokens=summary.num_virtual_tokens,
                dtype=summary.dtype,
                size_bytes=draft.packed.size_bytes,
                base_model_name_or_path=summary.base_model_name_or_path,
                metadata_json=draft.metadata_json,
                creator=draft.creator,
                created_at=draft.created_at,
            )
        )

    def _name_base(self, prefix_id: int, version: int, base: BaseSpec) -> None:
        """Record the base's name for a version from before names were recorded."""
        self.connection.execute(
            update(versions)
            .where(
                versions.c.prefix_id == prefix_id,
                versions.c.version == version,
                versions.c.base.is_(None),
            )
            .values(base=base.name)
        )

    def _point(self, key: Column[str], value: str, prefix_id: int, version: int) -> None:
        before = point(self.connection, key, value, prefix_id=prefix_id, version=version)
        self.num_aliases_added += before is None and key.table is aliases
        self._note_unnamed(prefix_id, before)

    def _note_unnamed(self, prefix_id: int, version: int | None) -> None:
        """A name, alias or pin moved away from ``version``; None: it referred to none."""
        if version is not None:
            digest = select(versions.c.digest).where(
                versions.c.prefix_id == prefix_id, versions.c.version == version
            )
            self._unnamed.update(self.connection.execute(digest).scalars())
