"""The prefix store: publish, change, resolve and fetch. Bytes in blobs, names in the catalog."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from prefixd.store.artifact.artifact import (
    pack_composition,
    read_composition,
    read_text,
)
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.composition import Combine
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.metadata import encode_metadata
from prefixd.store.catalog import agreements
from prefixd.store.catalog.agreements import Agreement
from prefixd.store.catalog.changes import Change, Precondition, Published, unconditional
from prefixd.store.catalog.manifests import (
    Manifest,
    Page,
    check_any_of_base,
    find,
    list_page,
    manifests,
    present_members,
    unknown,
    versions_of,
)
from prefixd.store.catalog.pins import Pinned, pinned
from prefixd.store.catalog.tables import prefixes, versions
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.catalog.version_rows import has_other_count, set_count
from prefixd.store.db.database import reading, writing
from prefixd.store.errors import CorruptArtifact, UnknownPrefix
from prefixd.store.gc import DEFAULT_GRACE, GcResult, collect
from prefixd.store.members import CountStack, check_same, composed_of
from prefixd.store.names import BlobKey, Reference, check_name, parse_reference, selected
from prefixd.store.publisher import Publisher

__all__ = ["Change", "Manifest", "Page", "PrefixStore", "Published"]

_log = getLogger("prefixd.store")


class PrefixStore(Publisher):
    """Prefixes of all tenants. Blocking; safe from several threads and processes at once.

    The tables must exist (``prefixd.store.db.migrate.upgrade``). Another tenant's prefix and a
    missing one raise the same UnknownPrefix.
    """

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

    def present_members(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """The versions that a composition is made of, in order. Raises MemberDeleted."""
        if not manifest.members:
            return ()
        with reading(self._engine) as connection:
            return present_members(connection, manifest.tenant, manifest.members)

    def stack_parts(self, members: Sequence[Manifest]) -> "list[str | int]":
        """What the members of a stack are: a text, or so many virtual tokens. Raises as
        ``fetch``."""
        return [
            read_text(self.fetch(tenant=member.tenant, digest=member.digest))
            if member.has_text
            else member.num_virtual_tokens
            for member in members
        ]

    def publish_composition(
        self,
        *,
        tenant: str,
        name: str,
        kind: Kind,
        members: Sequence[tuple[str, float | None]],
        combine: Combine | None = None,
        metadata: Mapping[str, Any] | None,
        base: BaseSpec,
        count_stack: CountStack,
        creator: str | None = None,
        precondition: Precondition = unconditional,
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """Publish a stack, a blend or an ensemble of ``members``: references, which are resolved
        now, and of a blend their weights. ``count_stack`` counts the virtual tokens of texts and
        of others. As ``publish_peft``; raises UnknownPrefix, BaseMismatch, CorruptArtifact and
        MemberDeleted for members too."""
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        summary = composed_of(
            self, tenant, kind, members, combine=combine, base=base, count_stack=count_stack
        )
        return self._publish(
            summary,
            partial(pack_composition, kind, summary.members, combine),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            replaces_metadata=metadata is not None,
            base=base,
            creator=creator,
            precondition=precondition,
        )

    def publish_stored(
        self, *, artifact: Path, count_stack: CountStack, **options: Any
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """As ``publish_artifact``, also of a composition, whose members must be here with the same
        bytes under the same names."""
        composition = read_composition(artifact)
        if composition is None:
            return self.publish_artifact(artifact=artifact, **options)
        del options["count_tokens"]
        kind, members, combine = composition
        for member in members:
            check_same(self, options["tenant"], member, base=options["base"])
        named = [(member.reference, member.weight) for member in members]
        return self.publish_composition(
            kind=kind, members=named, combine=combine, count_stack=count_stack, **options
        )

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

    def count_agreement(self, manifest: Manifest, agreed: Sequence[int], compared: int) -> None:
        """Add how often each member of an ensemble agreed with its answers, of ``compared``."""
        with writing(self._engine) as connection:
            agreements.count(
                connection,
                tenant=manifest.tenant,
                name=manifest.name,
                version=manifest.version,
                agreed=agreed,
                compared=compared,
            )

    def agreement(self, manifest: Manifest) -> dict[int, Agreement]:
        """How often members of an ensemble agreed with its answers, by their place."""
        with reading(self._engine) as connection:
            return agreements.read(
                connection,
                tenant=manifest.tenant,
                name=manifest.name,
                version=manifest.version,
            )

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

    @property
    def num_blob_failures(self) -> int:
        """Requests to a remote store of blobs that failed."""
        return self._blobs.num_failures

    def remove_interrupted(self) -> None:
        """Remove the local files of interrupted uploads and downloads."""
        self._blobs.remove_interrupted()

    def _report_corrupt(self, key: BlobKey, message: str) -> None:
        self._rows.mark_corrupt(key, now=self._clock())
        _log.error("quarantined a blob of tenant %s: %s", key.tenant, message)
