"""Changes to the catalog, as units of work: one transaction on the names of one tenant.

Rows are locked in one order, so that writers wait for each other and never deadlock: the row of
the prefix, then those of blobs by digest, then all pins, then the rows that the caller's own
statements lock.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.recipe import folded
from prefixd.store.artifact.template import check_role, check_template
from prefixd.store.catalog.alias_rows import Pointed, highest_left, point, pointed, replace_latest
from prefixd.store.catalog.blob_rows import claim, release
from prefixd.store.catalog.changes import (
    Change,
    Draft,
    Precondition,
    Published,
    Removed,
    unconditional,
)
from prefixd.store.catalog.manifests import Manifest, check_base, find, numbered, unknown
from prefixd.store.catalog.pins import drop_pin, orphans, pinned_version, put_pin
from prefixd.store.catalog.prefix_rows import (
    PrefixRow,
    has_versions,
    insert_version,
    lock,
    lock_or_create,
    name_base,
)
from prefixd.store.catalog.revisions import mark_versions, raise_revision
from prefixd.store.catalog.tables import agreements, aliases, latest_versions, versions
from prefixd.store.catalog.version_rows import merge_metadata, replace_metadata
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

    ``precondition`` gets these revisions: of a prefix its own; of a version its own and that of its
    prefix; of an alias its own, that of the version it means and that of the prefix.
    """

    connection: Connection
    _tenant: str
    _now: datetime
    _unnamed: set[str] = field(default_factory=set)  # digests that lost a name, alias or pin
    _pins_changed: bool = False
    num_aliases_added: int = 0

    def publish(
        self, draft: Draft, *, name: str, precondition: Precondition = unconditional
    ) -> Published:
        """Give the draft's bytes a version under ``name`` and point the ``latest`` of its base at
        it.

        The same bytes for the same base keep the version they have; the draft may replace its
        metadata. Raises BlobCollected when a collection removed the blob since it was wanted, and
        ArtifactRefused for metadata that names another task or base than the version's.
        """
        tx, tenant, digest = self.connection, self._tenant, draft.packed.digest
        row = lock_or_create(tx, tenant, name)
        precondition((row.revision,) if has_versions(tx, row.id) else ())
        claim(tx, BlobKey(tenant, digest), ticket=draft.ticket)
        existing = tx.execute(
            select(versions.c.version).where(
                versions.c.prefix_id == row.id,
                versions.c.digest == digest,
                versions.c.fingerprint == draft.base.fingerprint,
            )
        ).scalar()
        revision = raise_revision(tx, row.id)
        metadata_changed = False
        if existing is None:
            version = insert_version(tx, draft, row, tenant=tenant, revision=revision)
        else:
            version = existing
            name_base(tx, row.id, version, draft.base)
            if draft.replaces_metadata:
                metadata = json.loads(draft.metadata_json)
                metadata_changed = replace_metadata(tx, row.id, version, metadata)
        latest = latest_versions.c.fingerprint, draft.base.fingerprint
        before = pointed(tx, *latest, prefix_id=row.id)
        point(tx, *latest, prefix_id=row.id, version=version, revision=revision)
        self._changed(row, revision, now=version, old=_version(before))
        manifest = numbered(tx, tenant, name, version)
        return Published(manifest, created=existing is None, metadata_changed=metadata_changed)

    def merge_metadata(
        self,
        name: str,
        version: int | str,
        patch: Mapping[str, Any],
        *,
        base: BaseSpec,
        precondition: Precondition = unconditional,
    ) -> Manifest:
        """Merge ``patch`` into the metadata of a version, by RFC 7396: null removes a field.

        ``version`` is as for ``set_alias``. Raises ArtifactRefused.
        """
        reference = selected(name, version)
        tx, row = self.connection, self._lock(name, missing=unknown(reference))
        manifest = find(tx, self._tenant, reference, base=base)
        precondition((manifest.revision, row.revision))
        patch = folded(patch)
        merge_metadata(tx, row.id, manifest.version, patch)
        self._changed(row, raise_revision(tx, row.id), now=manifest.version)
        merged = numbered(tx, self._tenant, name, manifest.version)
        if "prompt_template" in patch:
            check_role(merged.prompt_template, merged.role)
            check_template(
                merged.prompt_template,
                kind=merged.kind,
                num_virtual_tokens=merged.num_virtual_tokens,
                all_in_front=base.encoder_layers is not None
                and merged.fingerprint == base.fingerprint,
            )
            self._pins_changed |= merged.pinned  # what stands in front may be another part of it
        return merged

    def set_alias(
        self,
        name: str,
        alias: str,
        *,
        version: int | str,
        base: BaseSpec,
        precondition: Precondition = unconditional,
    ) -> Manifest:
        """Point ``alias`` at a version, from any other one, and return that version.

        ``version`` is a number, or an alias of the name: then it is the version that this one means
        now for ``base``, the served one, and ``alias`` does not follow when it moves. ``latest``
        takes any version of ``base``, until the next publish moves it again; it raises BaseMismatch
        for a version of another base.
        """
        if alias != LATEST:
            check_alias(alias)
        key, value = aliases.c.alias, alias
        if alias == LATEST:
            key, value = latest_versions.c.fingerprint, base.fingerprint
        reference = selected(name, version)
        tx, row = self.connection, self._lock(name, missing=unknown(reference))
        before = pointed(tx, key, value, prefix_id=row.id)
        precondition(
            () if before is None else (before.revision, before.version_revision, row.revision)
        )
        # Raises before the alias of a missing version is set.
        manifest = find(tx, self._tenant, reference, base=base)
        if alias == LATEST:
            check_base(manifest, base)
        self.num_aliases_added += before is None and alias != LATEST
        revision = raise_revision(tx, row.id)
        point(tx, key, value, prefix_id=row.id, version=manifest.version, revision=revision)
        self._changed(row, revision, now=manifest.version, old=_version(before))
        return numbered(tx, self._tenant, name, manifest.version)

    def remove_alias(
        self, name: str, alias: str, *, precondition: Precondition = unconditional
    ) -> None:
        """Remove ``alias``; its version stays."""
        missing = unknown(Reference(check_name(name), alias=check_alias(alias)))
        tx, row = self.connection, self._lock(name, missing=missing)
        before = pointed(tx, aliases.c.alias, alias, prefix_id=row.id)
        if before is None:
            raise UnknownPrefix(missing)
        precondition((before.revision, before.version_revision, row.revision))
        tx.execute(delete(aliases).where(aliases.c.prefix_id == row.id, aliases.c.alias == alias))
        self._changed(row, raise_revision(tx, row.id), old=before.version)

    def set_pin(
        self,
        reference: str,
        *,
        base: BaseSpec,
        creator: str | None = None,
        precondition: Precondition = unconditional,
    ) -> Manifest:
        """Pin the version a reference means now, in place of any other of its prefix: servers keep
        it resident until it is unpinned."""
        parsed = parse_reference(reference)
        tx, row = self.connection, self._lock(parsed.name, missing=unknown(parsed))
        manifest = find(tx, self._tenant, parsed, base=base)
        precondition((manifest.revision, row.revision))
        before = pinned_version(tx, self._tenant, row.id)
        pin = {"since": self._now, "pinned_by": creator}
        put_pin(tx, self._tenant, row.id, manifest.version, **pin)
        self._pins_changed = True
        self._changed(row, raise_revision(tx, row.id), now=manifest.version, old=before)
        return numbered(tx, self._tenant, parsed.name, manifest.version)

    def remove_pin(self, name: str, *, precondition: Precondition = unconditional) -> None:
        """Unpin a prefix; raise UnknownPrefix when no version of it is pinned."""
        missing = f"no version of {check_name(name)} is pinned"
        tx, row = self.connection, self._lock(name, missing=missing)
        before = pinned_version(tx, self._tenant, row.id)
        if before is None:
            raise UnknownPrefix(missing)
        precondition((numbered(tx, self._tenant, name, before).revision, row.revision))
        drop_pin(tx, self._tenant, row.id)
        self._pins_changed = True
        self._changed(row, raise_revision(tx, row.id), old=before)

    def delete(self, name: str, *, precondition: Precondition = unconditional) -> int:
        """Remove a name with its versions, aliases and pin; the number of versions.

        The row stays, so that version numbers and revisions are not used again. The blobs stay
        until they are collected, recorded as unreferenced where no other name has them.
        """
        missing = unknown(Reference(check_name(name)))
        tx, row = self.connection, self._lock(name, missing=missing)
        in_prefix = versions.c.prefix_id == row.id
        digests = tx.execute(select(versions.c.digest).where(in_prefix)).scalars().all()
        if not digests:
            raise UnknownPrefix(missing)
        precondition((row.revision,))
        raise_revision(tx, row.id)
        for table in (aliases, latest_versions, agreements):
            tx.execute(delete(table).where(table.c.prefix_id == row.id))
        if drop_pin(tx, self._tenant, row.id):
            self._pins_changed = True
        removed = tx.execute(delete(versions).where(in_prefix))
        release(tx, self._tenant, digests, now=self._now)
        self._unnamed.update(digests)
        return removed.rowcount

    def delete_version(
        self, name: str, version: int, *, base: BaseSpec, precondition: Precondition = unconditional
    ) -> Removed:
        """Remove one version. The ``latest`` of its base, if it was that, becomes the highest
        version left of that base; without any version the name is gone, as after ``delete``.

        ``base`` is the served one. Raises VersionInUse while an alias or the pin refers to it. The
        caller checks in this transaction what else refers to it: the name stays locked until then.
        """
        missing = unknown(Reference(check_name(name), alias=None, version=version))
        tx, row = self.connection, self._lock(name, missing=missing)
        manifest = numbered(tx, self._tenant, name, version)
        precondition((manifest.revision, row.revision))
        self._check_unused(manifest)
        fingerprint, revision = manifest.fingerprint, raise_revision(tx, row.id)
        highest = highest_left(tx, row.id, without=version, fingerprint=fingerprint)
        ends_name = highest is None and (
            fingerprint == base.fingerprint or highest_left(tx, row.id, without=version) is None
        )
        if LATEST in manifest.aliases:
            replace_latest(tx, row.id, fingerprint, highest, revision=revision)
            self._changed(row, revision, now=highest)
        for table in (agreements, versions):
            tx.execute(delete(table).where(table.c.prefix_id == row.id, table.c.version == version))
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

    def _lock(self, name: str, *, missing: str) -> PrefixRow:
        return lock(self.connection, self._tenant, name, missing=missing)

    def _changed(
        self, row: PrefixRow, revision: int, *, now: int | None = None, old: int | None = None
    ) -> None:
        """The manifests of two versions changed; ``old`` lost a name, alias or pin. None is no
        version."""
        mark_versions(self.connection, row.id, (now, old), revision=revision)
        if old is not None:
            digest = select(versions.c.digest).where(
                versions.c.prefix_id == row.id, versions.c.version == old
            )
            self._unnamed.update(self.connection.execute(digest).scalars())


def _version(before: Pointed | None) -> int | None:
    return None if before is None else before.version
