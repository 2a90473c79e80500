"""Changes to the catalog, as units of work: one transaction on the names of one tenant.

Rows are locked in one order, so that writers wait for each other and never deadlock: the row of
the prefix, then those of blobs by digest, then all pins, then the rows that the caller's own
statements lock.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from prefixd.store.artifact.artifact import Packed, Summary
from prefixd.store.catalog.blob_rows import claim, release
from prefixd.store.catalog.manifests import Manifest, manifests, referenced, unknown
from prefixd.store.catalog.pins import drop_pin, orphans, pinned_version, put_pin
from prefixd.store.catalog.tables import aliases, prefixes, versions
from prefixd.store.db.database import insert_into
from prefixd.store.errors import UnknownPrefix
from prefixd.store.names import (
    BlobKey,
    Reference,
    check_alias,
    check_name,
    parse_reference,
    selected,
)


@dataclass(frozen=True, slots=True)
class Draft:
    """A version without its number. ``ticket`` is the one its blob was wanted with; see
    ``prefixd.store.catalog.blob_rows``."""

    summary: Summary
    packed: Packed
    fingerprint: str
    metadata_json: str
    creator: str | None
    created_at: datetime
    ticket: str


@dataclass(frozen=True, slots=True)
class Published:
    """The version of a publish; ``created`` is False when the same bytes had one already."""

    manifest: Manifest
    created: bool


@dataclass(frozen=True, slots=True)
class Change:
    """The effect of a transaction: blobs that no ``latest``, alias or pin of their tenant refers to
    any more, though a version may still have them; and whether pins changed."""

    orphans: tuple[BlobKey, ...] = ()
    pins: bool = False


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

    def publish(self, draft: Draft, *, name: str) -> Published:
        """Give the draft's bytes a version under ``name`` and point ``latest`` at it.

        The same bytes for the same base keep the version they have, with its first metadata.
        Raises BlobCollected when a collection removed the blob since it was wanted.
        """
        prefix_id, next_version, latest = self._lock_or_create(name)
        claim(self.connection, BlobKey(self._tenant, draft.packed.digest), ticket=draft.ticket)
        existing = self.connection.execute(
            select(versions.c.version).where(
                versions.c.prefix_id == prefix_id,
                versions.c.digest == draft.packed.digest,
                versions.c.fingerprint == draft.fingerprint,
            )
        ).scalar()
        version = next_version if existing is None else existing
        if existing is None:
            self._insert_version(draft, prefix_id, version)
        self.connection.execute(
            update(prefixes)
            .where(prefixes.c.id == prefix_id)
            .values(latest_version=version, next_version=max(next_version, version + 1))
        )
        if latest not in {None, version}:
            self._note_unnamed(prefix_id, latest)
        manifest = self._manifest(Reference(name, alias=None, version=version))
        return Published(manifest, created=existing is None)

    def set_alias(self, name: str, alias: str, *, version: int | str) -> Manifest:
        """Point ``alias`` at a version, from any other one, and return that version.

        ``version`` is a number, or an alias of the name: then it is the version that this one means
        now, and ``alias`` does not follow when it moves.
        """
        check_alias(alias)
        wanted = selected(name, version)
        prefix_id = self._lock(name, missing=unknown(wanted))
        version = self._manifest(wanted).version  # raises before the alias of a missing one is set
        reference = Reference(name, alias=None, version=version)
        before = self.connection.execute(
            select(aliases.c.version).where(
                aliases.c.prefix_id == prefix_id, aliases.c.alias == alias
            )
        ).scalar()
        row = insert_into(self.connection, aliases).values(
            prefix_id=prefix_id, alias=alias, version=version
        )
        self.connection.execute(
            row.on_conflict_do_update(
                index_elements=["prefix_id", "alias"], set_={"version": version}
            )
        )
        self._note_unnamed(prefix_id, before)
        return self._manifest(reference)

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

    def set_pin(self, reference: str, *, creator: str | None = None) -> Manifest:
        """Pin the version a reference means now, in place of any other of its prefix: servers keep
        it resident until it is unpinned."""
        parsed = parse_reference(reference)
        prefix_id = self._lock(parsed.name, missing=unknown(parsed))
        manifest = self._manifest(parsed)
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
        self.connection.execute(delete(aliases).where(aliases.c.prefix_id == prefix_id))
        if drop_pin(self.connection, self._tenant, prefix_id):
            self._pins_changed = True
        removed = self.connection.execute(delete(versions).where(in_prefix))
        self.connection.execute(
            update(prefixes).where(prefixes.c.id == prefix_id).values(latest_version=None)
        )
        release(self.connection, self._tenant, digests, now=self._now)
        self._unnamed.update(digests)
        return removed.rowcount

    def change(self) -> Change:
        """The effect so far; to be read before the commit."""
        if not self._unnamed:
            return Change(pins=self._pins_changed)
        keys = orphans(self.connection, self._tenant, self._unnamed)
        return Change(keys, pins=self._pins_changed)

    def _manifest(self, reference: Reference) -> Manifest:
        for manifest in manifests(self.connection, referenced(self._tenant, reference)):
            return manifest
        raise UnknownPrefix(unknown(reference))

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

    def _lock_or_create(self, name: str) -> tuple[int, int, int | None]:
        """Row id, next and latest version number of a name, locked."""
        statement = (
            select(prefixes.c.id, prefixes.c.next_version, prefixes.c.latest_version)
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
        return row.id, row.next_version, row.latest_version

    def _insert_version(self, draft: Draft, prefix_id: int, version: int) -> None:
        summary = draft.summary
        self.connection.execute(
            insert(versions).values(
                prefix_id=prefix_id,
                version=version,
                tenant=self._tenant,
                digest=draft.packed.digest,
                fingerprint=draft.fingerprint,
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

    def _note_unnamed(self, prefix_id: int, version: int | None) -> None:
        """A name, alias or pin moved away from ``version``; None: it referred to none."""
        if version is not None:
            digest = select(versions.c.digest).where(
                versions.c.prefix_id == prefix_id, versions.c.version == version
            )
            self._unnamed.update(self.connection.execute(digest).scalars())
