"""The prefix store: publish, resolve, delete, fetch. Bytes in blobs, names in the catalog.

A publish judges the upload, notes that its blob is wanted, writes the blob, and only then the row
of the version: a version always has its blob, and a blob without a version was never acknowledged.
"""

from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from logging import getLogger
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from prefixd.store.artifact.artifact import (
    Packed,
    Summary,
    inspect_peft,
    inspect_text,
    pack_peft,
    pack_text,
)
from prefixd.store.artifact.base import BaseSpec
from prefixd.store.artifact.metadata import encode_metadata
from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobCollected, BlobRows
from prefixd.store.catalog.catalog import Catalog, Watch, Within, WithinPublish, WithinVersion
from prefixd.store.catalog.drafts import Draft
from prefixd.store.catalog.pins import Pinned
from prefixd.store.digest import BlobKey
from prefixd.store.errors import CorruptArtifact, UnknownPrefix
from prefixd.store.gc import DEFAULT_GRACE, GcResult, collect
from prefixd.store.manifest import Manifest, Page, Published
from prefixd.store.names import Reference, check_alias, check_name, check_tenant, parse_reference

__all__ = ["Manifest", "Page", "PrefixStore", "Published"]

_PUBLISH_ATTEMPTS = 10
_log = getLogger("prefixd.store")


def _utc_now() -> datetime:
    return datetime.now(UTC)


class PrefixStore:
    """Prefixes of all tenants. Blocking; safe from several threads and processes at once.

    The tables must exist (``database.create_tables``, once ``catalog.tables`` is
    imported, as it is by this module). Another tenant's prefix and a missing one raise the same
    UnknownPrefix.

    ``within`` is called with the connection and the result in the transaction of a change, just
    before it commits; what it raises undoes the change.
    """

    def __init__(
        self, engine: Engine, blobs: Blobs, *, clock: Callable[[], datetime] = _utc_now
    ) -> None:
        self._catalog = Catalog(engine)
        self._rows = BlobRows(engine)
        self._blobs = blobs
        self._clock = clock

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
        within: WithinPublish | None = None,
    ) -> Published:
        """Publish ``adapter_config.json`` and a spooled ``adapter_model.safetensors``.

        Durable on return. The same content again under the same name is the same version, and
        ``latest`` points at it again. ``creator`` is the id of the key that publishes. Raises
        ArtifactRefused, InvalidReference.
        """
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        summary = inspect_peft(config, weights, base=base, task_id=task_id)
        return self._publish(
            summary,
            lambda target: pack_peft(config, weights, target, task_id=task_id),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            base=base,
            creator=creator,
            within=within,
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
        within: WithinPublish | None = None,
    ) -> Published:
        """Publish a hard prompt; ``count_tokens`` is the base's tokenizer. As ``publish_peft``."""
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        summary = inspect_text(text, base=base, count_tokens=count_tokens)
        return self._publish(
            summary,
            lambda target: pack_text(text, target),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            base=base,
            creator=creator,
            within=within,
        )

    def resolve(self, *, tenant: str, reference: str) -> Manifest:
        """The version that ``name``, ``name@3`` or ``name@alias`` means now.

        Raises InvalidReference, UnknownPrefix.
        """
        return self._catalog.resolve(parse_reference(reference), tenant=tenant)

    def manifest(self, *, tenant: str, name: str, version: int) -> Manifest:
        """One version; raise InvalidReference, UnknownPrefix."""
        reference = Reference(check_name(name), alias=None, version=version)
        return self._catalog.resolve(reference, tenant=tenant)

    def versions(
        self, *, tenant: str, name: str, limit: int | None = None, before: int | None = None
    ) -> tuple[Manifest, ...]:
        """All versions under a name, newest first, or ``limit`` of those before the number
        ``before``; raise InvalidReference, UnknownPrefix."""
        return self._catalog.versions(
            tenant=tenant, name=check_name(name), limit=limit, before=before
        )

    def list(self, *, tenant: str, limit: int = 100, after: str | None = None) -> Page:
        """The latest version of each name, by name, at most ``limit`` after the name ``after``."""
        if limit < 1:
            raise ValueError(f"expected a limit from 1, got {limit}")
        return self._catalog.page(tenant=tenant, limit=limit, after=after)

    def set_alias(
        self,
        *,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        within: WithinVersion | None = None,
    ) -> Manifest:
        """Point ``alias`` at a version and return it; raise InvalidReference, UnknownPrefix."""
        return self._catalog.set_alias(
            tenant=tenant,
            name=check_name(name),
            alias=check_alias(alias),
            version=version,
            within=within,
        )

    def remove_alias(
        self, *, tenant: str, name: str, alias: str, within: Within | None = None
    ) -> None:
        """Forget ``alias``; raise InvalidReference, UnknownPrefix."""
        self._catalog.remove_alias(
            tenant=tenant, name=check_name(name), alias=check_alias(alias), within=within
        )

    def set_pin(
        self,
        *,
        tenant: str,
        reference: str,
        creator: str | None = None,
        within: WithinVersion | None = None,
    ) -> Manifest:
        """Pin the version a reference means now: servers keep it resident, until it is unpinned or
        another version of its prefix is pinned. Raises InvalidReference, UnknownPrefix."""
        return self._catalog.set_pin(
            tenant=tenant,
            reference=parse_reference(reference),
            now=self._clock(),
            creator=creator,
            within=within,
        )

    def remove_pin(self, *, tenant: str, name: str, within: Within | None = None) -> None:
        """Unpin a prefix; raise InvalidReference, or UnknownPrefix when no version is pinned."""
        self._catalog.remove_pin(tenant=tenant, name=check_name(name), within=within)

    def pinned(self, *, fingerprint: str) -> tuple[Pinned, ...]:
        """What is pinned of the prefixes of one base, by all tenants, the oldest pin first."""
        return self._catalog.pinned(fingerprint=fingerprint)

    def watch(self, watcher: Watch) -> None:
        """Have ``watcher`` called, in place of any before it, after each change made through this
        object that changed pins, or after which nothing means some blob any more. On the thread of
        the change: it should be quick, and what it raises reaches whoever made the change."""
        self._catalog.watch = watcher

    def delete(self, *, tenant: str, name: str, within: Within | None = None) -> int:
        """Forget a name with its versions, aliases and pin; how many versions there were.

        The numbers are not used again, and the blobs stay until they are collected. Raises
        InvalidReference, UnknownPrefix.
        """
        return self._catalog.delete(
            tenant=tenant, name=check_name(name), now=self._clock(), within=within
        )

    def deleted(self, keys: Collection[BlobKey]) -> tuple[BlobKey, ...]:
        """Those of ``keys`` that no version of their tenant has any more."""
        return self._rows.deleted(keys)

    def fetch(self, *, tenant: str, digest: str) -> Path:
        """A local file with the artifact of a digest, verified now.

        Raises UnknownPrefix, or CorruptArtifact: then the blob is quarantined, and stays so until
        the same bytes are published again.
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
        within: WithinPublish | None,
    ) -> Published:
        check_tenant(tenant)
        for _ in range(_PUBLISH_ATTEMPTS):
            try:
                packed, ticket = self._write_blob(pack, tenant=tenant)
                draft = Draft(
                    summary=summary,
                    digest=packed.digest,
                    size_bytes=packed.size_bytes,
                    fingerprint=base.fingerprint,
                    metadata_json=metadata_json,
                    creator=creator,
                    created_at=self._clock(),
                    ticket=ticket,
                )
                return self._catalog.publish(draft, tenant=tenant, name=name, within=within)
            except BlobCollected:
                # It took longer than the grace of a collection that ran meanwhile.
                continue
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
