"""The prefix store: publish, resolve, delete, fetch. Bytes in blobs, names in the catalog.

A publish judges the upload, writes the blob, and only then the catalog's row: a row always has its
blob, and a blob without a row was never acknowledged.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from prefix_store.artifact import (
    Packed,
    Summary,
    inspect_peft,
    inspect_text,
    pack_peft,
    pack_text,
)
from prefix_store.base import BaseSpec
from prefix_store.blobs import LocalBlobs
from prefix_store.catalog import Catalog
from prefix_store.manifest import Manifest, Page, Published, encode_metadata
from prefix_store.names import Reference, check_alias, check_name, check_tenant, parse_reference

__all__ = ["Manifest", "Page", "PrefixStore", "Published"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class PrefixStore:
    """Prefixes of all tenants. Blocking; safe from several threads and processes at once.

    The tables must exist (``prefix_store.database.create_tables``, once ``prefix_store.tables`` is
    imported, as it is by this module). Another tenant's prefix and a missing one raise the same
    UnknownPrefix.
    """

    def __init__(
        self, engine: Engine, blobs: LocalBlobs, *, clock: Callable[[], datetime] = _utc_now
    ) -> None:
        self._catalog = Catalog(engine)
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
    ) -> Published:
        """Publish ``adapter_config.json`` and a spooled ``adapter_model.safetensors``.

        Durable on return. The same content again under the same name is the same version, and
        ``latest`` points at it again. Raises ArtifactRefused, InvalidReference.
        """
        check_name(name)
        metadata_json = encode_metadata(metadata)
        summary = inspect_peft(config, weights, base=base, task_id=task_id)
        return self._publish(
            summary,
            lambda target: pack_peft(config, weights, target, task_id=task_id),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            base=base,
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
    ) -> Published:
        """Publish a hard prompt; ``count_tokens`` is the base's tokenizer. As ``publish_peft``."""
        check_name(name)
        metadata_json = encode_metadata(metadata)
        summary = inspect_text(text, base=base, count_tokens=count_tokens)
        return self._publish(
            summary,
            lambda target: pack_text(text, target),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            base=base,
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

    def versions(self, *, tenant: str, name: str) -> tuple[Manifest, ...]:
        """All versions under a name, newest first; raise InvalidReference, UnknownPrefix."""
        return self._catalog.versions(tenant=tenant, name=check_name(name))

    def list(self, *, tenant: str, limit: int = 100, after: str | None = None) -> Page:
        """The latest version of each name, by name, at most ``limit`` after the name ``after``."""
        if limit < 1:
            raise ValueError(f"expected a limit from 1, got {limit}")
        return self._catalog.page(tenant=tenant, limit=limit, after=after)

    def set_alias(self, *, tenant: str, name: str, alias: str, version: int) -> Manifest:
        """Point ``alias`` at a version and return it; raise InvalidReference, UnknownPrefix."""
        return self._catalog.set_alias(
            tenant=tenant, name=check_name(name), alias=check_alias(alias), version=version
        )

    def remove_alias(self, *, tenant: str, name: str, alias: str) -> None:
        """Forget ``alias``; raise InvalidReference, UnknownPrefix."""
        self._catalog.remove_alias(tenant=tenant, name=check_name(name), alias=check_alias(alias))

    def delete(self, *, tenant: str, name: str) -> int:
        """Forget a name with all its versions and aliases; how many versions there were.

        The numbers are not used again, and the blobs stay until they are collected. Raises
        InvalidReference, UnknownPrefix.
        """
        return self._catalog.delete(tenant=tenant, name=check_name(name))

    def fetch(self, *, tenant: str, digest: str) -> Path:
        """The artifact file of a digest, verified now; raise UnknownPrefix, CorruptArtifact."""
        return self._blobs.fetch(tenant=tenant, digest=digest)

    def _publish(
        self,
        summary: Summary,
        pack: Callable[[Path], Packed],
        *,
        tenant: str,
        name: str,
        metadata_json: str,
        base: BaseSpec,
    ) -> Published:
        check_tenant(tenant)
        with self._blobs.staging() as staged:
            packed = pack(staged)
            self._blobs.put(staged, tenant=tenant, digest=packed.digest)
        return self._catalog.publish(
            summary,
            tenant=tenant,
            name=name,
            digest=packed.digest,
            size_bytes=packed.size_bytes,
            fingerprint=base.fingerprint,
            metadata_json=metadata_json,
            now=self._clock(),
        )
