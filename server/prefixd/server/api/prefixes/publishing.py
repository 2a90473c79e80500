"""One publish, with everything that must happen with it or not at all: the tenant's quotas, the
audit entry and the answer kept under an idempotency key are written in the store's transaction."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from prefixd.server.api.prefixes.manifests import PrefixManifest
from prefixd.server.api.served import ServedModel
from prefixd.server.errors import Unprocessable
from prefixd.server.tenants.audit import Action, AuditLog
from prefixd.server.tenants.idempotency import Idempotency, Replay, check_key
from prefixd.server.tenants.principal import Actor, Principal
from prefixd.server.tenants.quotas import check_stored
from prefixd.store.artifact.base import BaseSpec
from prefixd.store.store import PrefixStore, Published

Within = Callable[[Connection, Published], None]


@dataclass(frozen=True, slots=True)
class UploadResult:
    """The answer to an upload. ``replayed``: it was given before, and nothing was done now."""

    status: int
    body: Mapping[str, Any]
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Publishing:
    """A publish by one principal under one name; ``key`` is the Idempotency-Key, if any came."""

    store: PrefixStore
    audit: AuditLog
    idempotency: Idempotency
    served: ServedModel
    principal: Principal
    actor: Actor
    name: str
    key: str | None

    def peft(
        self,
        config: bytes,
        weights: Path,
        *,
        metadata: Mapping[str, Any] | None,
        task_id: int | None,
    ) -> UploadResult:
        """Publish PEFT's two files. Blocking. Raises as the store does, QuotaExceeded, Conflict."""

        def publish(within: Within) -> Published:
            return self.store.publish_peft(
                tenant=self.principal.tenant,
                name=self.name,
                config=config,
                weights=weights,
                metadata=metadata,
                base=self._base(),
                task_id=task_id,
                creator=self.principal.key_id,
                within=within,
            )

        def digest() -> str:
            with weights.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            return self._digest("peft", config, content.encode(), metadata)

        return self._once(publish, digest)

    def text(self, text: str, *, metadata: Mapping[str, Any] | None) -> UploadResult:
        """Publish a text. As ``peft``."""

        def publish(within: Within) -> Published:
            return self.store.publish_text(
                tenant=self.principal.tenant,
                name=self.name,
                text=text,
                metadata=metadata,
                base=self._base(),
                count_tokens=self.served.count_prefix_tokens,
                creator=self.principal.key_id,
                within=within,
            )

        return self._once(publish, partial(self._digest, "text", text.encode(), metadata))

    def _once(
        self, publish: Callable[[Within], Published], digest: Callable[[], str]
    ) -> UploadResult:
        if self.key is None:
            return self._done(publish(partial(self._within, None)))
        check_key(self.key)
        request_digest = digest()
        found = self._replay(request_digest)
        if found is not None:
            return found
        try:
            return self._done(publish(partial(self._within, request_digest)))
        except IntegrityError:
            # Another request under this key was faster, and its answer is the answer.
            found = self._replay(request_digest)
            if found is None:
                raise
            return found

    def _replay(self, request_digest: str) -> UploadResult | None:
        assert self.key is not None
        found = self.idempotency.find(
            self.principal.tenant, self.key, request_digest=request_digest
        )
        return None if found is None else UploadResult(found.status, found.body, replayed=True)

    def _within(
        self, request_digest: str | None, connection: Connection, published: Published
    ) -> None:
        tenant, manifest = self.principal.tenant, published.manifest
        if published.created:
            check_stored(connection, tenant, self.principal.quota)
        self.audit.add(
            connection,
            Action.PREFIX_PUBLISH,
            actor=self.actor,
            tenant=tenant,
            subject=self.name,
            version=manifest.version,
            digest=manifest.digest,
            created=published.created,
        )
        if self.key is not None and request_digest is not None:
            done = self._done(published)
            self.idempotency.keep(
                connection,
                tenant,
                self.key,
                request_digest=request_digest,
                replay=Replay(done.status, done.body),
            )

    def _done(self, published: Published) -> UploadResult:
        body = PrefixManifest.of(published.manifest).model_dump(mode="json")
        return UploadResult(201 if published.created else 200, body)

    def _base(self) -> BaseSpec:
        """The served base, with no more virtual tokens than this tenant's prefixes may have."""
        base, own = self.served.base, self.principal.quota.max_virtual_tokens
        if own is None or own >= base.max_virtual_tokens:
            return base
        return replace(base, max_virtual_tokens=own)

    def _digest(self, kind: str, *parts: bytes | Mapping[str, Any] | None) -> str:
        """SHA-256 of what is asked, under this name; each part with its length before it."""
        total = hashlib.sha256()
        for part in (kind.encode(), self.name.encode(), *parts):
            raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
            total.update(len(raw).to_bytes(8, "big") + raw)
        return total.hexdigest()


def parse_metadata(raw: bytes | None) -> dict[str, Any] | None:
    """The part ``metadata`` as an object. Raises Unprocessable."""
    if raw is None:
        return None
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unprocessable(
            "expected the part 'metadata' to be a JSON object",
            code="malformed_metadata",
            param="metadata",
        )
    return found


def task_id_of(metadata: Mapping[str, Any] | None) -> int | None:
    """``metadata.task_id``. Raises Unprocessable."""
    task_id = (metadata or {}).get("task_id")
    if task_id is not None and (type(task_id) is not int or task_id < 0):
        raise Unprocessable(
            "expected metadata.task_id to be a whole number from 0",
            code="malformed_metadata",
            param="metadata.task_id",
        )
    return task_id
