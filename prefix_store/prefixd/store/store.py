"""The prefix store: publish, change, resolve and fetch. Bytes in blobs, names in the catalog.

A publish checks the upload, records that its blob is wanted, writes the blob, and only then writes
the row of the version: a version always has its blob, and a blob without a version was never
acknowledged.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from prefixd.store.artifact.artifact import (
    Packed,
    Summary,
    inspect_artifact,
    inspect_peft,
    inspect_text,
    pack_artifact,
    pack_peft,
    pack_text,
)
from prefixd.store.artifact.config import BaseSpec, encode_metadata
from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobCollected, BlobRows
from prefixd.store.catalog.changes import Change, Draft, Published
from prefixd.store.catalog.manifests import (
    Manifest,
    Page,
    check_any_of_base,
    find,
    list_page,
    manifests,
    unknown,
    versions_of,
)
from prefixd.store.catalog.pins import Pinned, pinned
from prefixd.store.catalog.tables import prefixes, versions
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.catalog.version_rows import has_other_count, set_count
from prefixd.store.db.database import reading, utc_now, writing
from prefixd.store.errors import CorruptArtifact, UnknownPrefix
from prefixd.store.gc import DEFAULT_GRACE, GcResult, collect
from prefixd.store.names import (
    BlobKey,
    Reference,
    check_name,
    check_tenant,
    parse_reference,
    selected,
)

__all__ = ["Change", "Manifest", "Page", "PrefixStore", "Published"]

_PUBLISH_ATTEMPTS = 10
_log = getLogger("prefixd.store")


class PrefixStore:
    """Prefixes of all tenants. Blocking; safe from several threads and processes at once.

    The tables must exist (``prefixd.store.db.migrate.upgrade``). Another tenant's prefix and a
    missing one raise the same UnknownPrefix.
    """

    def __init__(
        self, engine: Engine, blobs: Blobs, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._engine = engine
        self._rows = BlobRows(engine)
        self._blobs = blobs
        self._clock = clock
        self._watcher: Callable[[Change], None] = lambda _: None

    @contextmanager
    def change(self, tenant: str) -> Iterator[CatalogTransaction]:
        """Changes to a tenant's prefixes: committed at the end of the block, rolled back by any
        exception in it. The watcher is called after the commit."""
        with writing(self._engine) as connection:
            tx = CatalogTransaction(connection, tenant, self._clock())
            yield tx
            change = tx.change()
        if change != Change():
            self._watcher(change)

    def watch(self, watcher: Callable[[Change], None]) -> None:
        """Set the function to call after each change made through this object that changed pins or
        left blobs without a name. It replaces the one before. It runs on the thread of the change,
        so it must be quick, and its exceptions are raised there."""
        self._watcher = watcher

    def publish_peft(
        self,
        *,
        tenant: str,
        name: str,
        config: bytes,
        weights: Path,
        metadata: Mapping[str, Any] | None,
        base: BaseSpec,
        task_id: int | None = None,
        creator: str | None = None,
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """Publish ``adapter_config.json`` and a spooled ``adapter_model.safetensors``.

        The version is written when the block begins; as with ``change``, it is committed, and
        durable, at its end. The same content again under the same name is the same version, and
        ``latest`` points at it again; ``metadata`` replaces that version's, None leaves it.
        ``creator`` is the id of the key that publishes. Raises
        ArtifactRefused, InvalidReference.
        """
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        return self._publish(
            inspect_peft(config, weights, base=base, task_id=task_id),
            partial(pack_peft, config, weights, task_id=task_id),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            replaces_metadata=metadata is not None,
            base=base,
            creator=creator,
        )

    def publish_text(
        self,
        *,
        tenant: str,
        name: str,
        text: str,
        metadata: Mapping[str, Any] | None,
        base: BaseSpec,
        count_tokens: Callable[[str], int],
        creator: str | None = None,
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """Publish a hard prompt; ``count_tokens`` is the base's tokenizer. As ``publish_peft``."""
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        return self._publish(
            inspect_text(text, base=base, count_tokens=count_tokens),
            partial(pack_text, text),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            replaces_metadata=metadata is not None,
            base=base,
            creator=creator,
        )

    def publish_artifact(
        self,
        *,
        tenant: str,
        name: str,
        artifact: Path,
        metadata: Mapping[str, Any] | None,
        base: BaseSpec,
        count_tokens: Callable[[str], int],
        creator: str | None = None,
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """Publish the stored file of any prefix, such as another server's: its digest stays. As
        ``publish_peft``, but an existing version keeps its metadata."""
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        return self._publish(
            inspect_artifact(artifact, base=base, count_tokens=count_tokens),
            partial(pack_artifact, artifact),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            base=base,
            creator=creator,
        )

    def resolve(self, *, tenant: str, reference: str, base: BaseSpec) -> Manifest:
        """The version that a reference (``name``, ``name@3``, ``name@alias``) means now.

        ``name`` and ``name@latest`` mean the latest version of ``base``; another reference may mean
        a version of any base. Raises InvalidReference, UnknownPrefix, or BaseMismatch for a name
        that has versions of other bases only.
        """
        parsed = parse_reference(reference)
        with reading(self._engine) as connection:
            return find(connection, tenant, parsed, base=base)

    def manifest(self, *, tenant: str, name: str, version: int | str, base: BaseSpec) -> Manifest:
        """One version of any base, by its number or by an alias; raises as ``resolve``."""
        with reading(self._engine) as connection:
            return find(connection, tenant, selected(name, version), base=base)

    def versions(
        self,
        *,
        tenant: str,
        name: str,
        base: BaseSpec | None = None,
        limit: int | None = None,
        before: int | None = None,
    ) -> tuple[Manifest, ...]:
        """All versions under a name, newest first, or ``limit`` of those before the number
        ``before``; with ``base`` only those of that base.

        Raises InvalidReference, UnknownPrefix when the name has none at all, and BaseMismatch when
        it has versions of other bases only.
        """
        everything = versions_of(tenant).where(prefixes.c.name == check_name(name))
        statement = everything.order_by(versions.c.version.desc()).limit(limit)
        if base is not None:
            statement = statement.where(versions.c.fingerprint == base.fingerprint)
        if before is not None:
            statement = statement.where(versions.c.version < before)
        with reading(self._engine) as connection:
            page = manifests(connection, statement)
            if not page and base is not None:
                check_any_of_base(connection, tenant, name, base=base)
            if not page and connection.execute(everything.limit(1)).first() is None:
                raise UnknownPrefix(unknown(Reference(name)))
        return page

    def list(
        self,
        *,
        tenant: str,
        base: BaseSpec | None = None,
        labels: Collection[tuple[str, str]] = (),
        limit: int = 100,
        after: str | None = None,
    ) -> Page:
        """The latest version of each name for ``base``, or for each of its bases, by name: those of
        at most ``limit`` names after the name ``after``, and only those with all of ``labels``."""
        if limit < 1:
            raise ValueError(f"expected a limit from 1, got {limit}")
        with reading(self._engine) as connection:
            return list_page(connection, tenant, base=base, labels=labels, limit=limit, after=after)

    def pinned(self, *, fingerprint: str) -> tuple[Pinned, ...]:
        """Pinned prefixes of one base, of all tenants, the oldest pin first."""
        with reading(self._engine) as connection:
            return pinned(connection, fingerprint=fingerprint)

    def deleted(self, keys: Collection[BlobKey]) -> tuple[BlobKey, ...]:
        """Those of ``keys`` that no version of their tenant has any more."""
        return self._rows.deleted(keys)

    def fetch(self, *, tenant: str, digest: str) -> Path:
        """A local file with the artifact of a digest, verified now.

        Raises UnknownPrefix, or CorruptArtifact: then the blob is quarantined until the same bytes
        are published again.
        """
        key = BlobKey(tenant, digest)
        if self._rows.is_corrupt(key):
            raise CorruptArtifact(f"the artifact {digest} is in quarantine; upload it again")
        try:
            return self._blobs.fetch(tenant=tenant, digest=digest)
        except CorruptArtifact as error:
            self._blobs.quarantine(tenant=tenant, digest=digest)
            self._report_corrupt(key, error.message)
            raise
        except UnknownPrefix:
            if not self._rows.is_referenced(key):
                raise
            message = f"the artifact {digest} is gone from the store of blobs; upload it again"
            self._report_corrupt(key, message)
            raise CorruptArtifact(message) from None

    def correct_count(self, key: BlobKey, *, fingerprint: str, num_virtual_tokens: int) -> None:
        """Record how many virtual tokens the versions with this text have on this base, where the
        catalog says otherwise."""
        with reading(self._engine) as connection:
            differs = has_other_count(connection, key, fingerprint, num_virtual_tokens)
        if differs:
            with writing(self._engine) as connection:
                set_count(connection, key, fingerprint, num_virtual_tokens)
            _log.warning(
                "a text of tenant %s has %d tokens; its manifest said otherwise and was corrected",
                key.tenant,
                num_virtual_tokens,
            )

    def collect(
        self,
        *,
        grace: timedelta = DEFAULT_GRACE,
        resident: Collection[BlobKey] = (),
        adopt: bool = False,
        dry_run: bool = False,
    ) -> GcResult:
        """Remove blobs that no version has; see ``prefixd.store.gc.collect``."""
        return collect(
            self._rows,
            self._blobs,
            now=self._clock(),
            grace=grace,
            resident=resident,
            adopt=adopt,
            dry_run=dry_run,
        )

    def _report_corrupt(self, key: BlobKey, message: str) -> None:
        self._rows.mark_corrupt(key, now=self._clock())
        _log.error("quarantined a blob of tenant %s: %s", key.tenant, message)

    @contextmanager
    def _publish(
        self,
        summary: Summary,
        pack: Callable[[Path], Packed],
        *,
        tenant: str,
        name: str,
        metadata_json: str,
        base: BaseSpec,
        creator: str | None,
        replaces_metadata: bool = False,
    ) -> Iterator[tuple[CatalogTransaction, Published]]:
        check_tenant(tenant)
        for _ in range(_PUBLISH_ATTEMPTS):
            # Raised when the publish took longer than the grace of a concurrent collection.
            with suppress(BlobCollected):
                packed, ticket = self._write_blob(pack, tenant=tenant)
                draft = Draft(
                    summary=summary,
                    packed=packed,
                    base=base,
                    metadata_json=metadata_json,
                    replaces_metadata=replaces_metadata,
                    creator=creator,
                    created_at=self._clock(),
                    ticket=ticket,
                )
                with self.change(tenant) as tx:
                    yield tx, tx.publish(draft, name=name)
                return
        raise RuntimeError("blobs are collected faster than they are published: the grace is 0")

    def _write_blob(self, pack: Callable[[Path], Packed], *, tenant: str) -> tuple[Packed, str]:
        with self._blobs.staging() as staged:
            packed = pack(staged)
            ticket = self._rows.want(
                BlobKey(tenant, packed.digest), size_bytes=packed.size_bytes, now=self._clock()
            )
            try:
                self._blobs.put(staged, tenant=tenant, digest=packed.digest)
            except UnknownPrefix:  # when it was read back
                raise BlobCollected from None
        return packed, ticket
