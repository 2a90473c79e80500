"""Changes to the prefix store: publishes, and transactions on the catalog.

A publish checks the upload, records that its blob is wanted, writes the blob, and only then writes
the row of the version: a version always has its blob, and a blob without a version was never
acknowledged.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from prefixd.store.artifact.artifact import (
    CountTokens,
    Summary,
    inspect_artifact,
    inspect_peft,
    inspect_text,
    pack_artifact,
    pack_peft,
    pack_text,
)
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.envelope import Packed
from prefixd.store.artifact.kinds import TextRole
from prefixd.store.artifact.metadata import encode_metadata
from prefixd.store.artifact.template import check_role, check_template
from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobCollected, BlobRows
from prefixd.store.catalog.changes import Change, Draft, Precondition, Published, unconditional
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.db.database import utc_now, writing
from prefixd.store.errors import UnknownPrefix
from prefixd.store.file_store import FileStore
from prefixd.store.names import BlobKey, check_name, check_tenant

_PUBLISH_ATTEMPTS = 10


class Publisher:
    """Publishes and changes prefixes; the part of ``PrefixStore`` that writes."""

    def __init__(
        self, engine: Engine, blobs: Blobs, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._engine = engine
        self._rows = BlobRows(engine)
        self._blobs = blobs
        self._clock = clock
        self.files = FileStore(engine, self._rows, blobs, clock=clock)
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
        precondition: Precondition = unconditional,
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """Publish ``adapter_config.json`` and a spooled ``adapter_model.safetensors``.

        The version is written when the block begins; as with ``change``, it is committed, and
        durable, at its end. The same content again under the same name is the same version, and
        ``latest`` points at it again; ``metadata`` replaces that version's, None leaves it.
        ``creator`` is the id of the key that publishes, ``precondition`` is on the prefix.
        Raises ArtifactRefused, InvalidReference.
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
            precondition=precondition,
        )

    def publish_text(
        self,
        *,
        tenant: str,
        name: str,
        text: str,
        metadata: Mapping[str, Any] | None,
        base: BaseSpec,
        count_tokens: CountTokens,
        role: TextRole = TextRole.RAW,
        creator: str | None = None,
        precondition: Precondition = unconditional,
    ) -> AbstractContextManager[tuple[CatalogTransaction, Published]]:
        """Publish a hard prompt; ``count_tokens`` is the base's tokenizer. As ``publish_peft``."""
        check_name(name)
        metadata_json = encode_metadata(metadata, base=base)
        return self._publish(
            inspect_text(text, base=base, count_tokens=count_tokens, role=role),
            partial(pack_text, text, role=role),
            tenant=tenant,
            name=name,
            metadata_json=metadata_json,
            replaces_metadata=metadata is not None,
            base=base,
            creator=creator,
            precondition=precondition,
        )

    def publish_artifact(
        self,
        *,
        tenant: str,
        name: str,
        artifact: Path,
        metadata: Mapping[str, Any] | None,
        base: BaseSpec,
        count_tokens: CountTokens,
        creator: str | None = None,
        precondition: Precondition = unconditional,
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
            precondition=precondition,
        )

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
        precondition: Precondition,
        replaces_metadata: bool = False,
    ) -> Iterator[tuple[CatalogTransaction, Published]]:
        check_tenant(tenant)
        template = json.loads(metadata_json).get("prompt_template")
        check_role(template, summary.role)
        check_template(
            template,
            kind=summary.kind,
            num_virtual_tokens=summary.num_virtual_tokens,
            all_in_front=base.encoder_layers is not None,
        )
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
                    yield tx, tx.publish(draft, name=name, precondition=precondition)
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
