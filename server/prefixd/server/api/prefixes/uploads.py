"""PUT /v1/prefixes/{name}: a new version, from PEFT's files or a text.

The tenant's quotas, the audit entry and the response stored under an idempotency key belong to the
transaction of the version: all of them are written, or none.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from sqlalchemy.exc import IntegrityError

from prefixd.server.api.body import StrictModel, json_request, media_type, parse_json, read_capped
from prefixd.server.api.dependencies import (
    Acting,
    BodyLimits,
    BodyLimitsDep,
    DrainStateDep,
    EngineDep,
    IdempotencyDep,
    LimiterDep,
    ServedDep,
    StoreDep,
    Writer,
)
from prefixd.server.api.prefixes.multipart import Upload, received
from prefixd.server.api.prefixes.residency import try_warm
from prefixd.server.api.prefixes.schemas import PrefixManifest
from prefixd.server.api.served import ServedModel
from prefixd.server.errors import BadRequest, Unprocessable
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Idempotency, Replay, check_key
from prefixd.server.tenants.principal import Actor, Principal
from prefixd.server.tenants.quotas import check_stored
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.files import sha256_of
from prefixd.store.store import PrefixStore, Published

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])


class TextPrefix(StrictModel):
    """A hard prompt, as the JSON body of PUT /v1/prefixes/{name}."""

    kind: Literal["text"]
    text: str = Field(min_length=1)
    metadata: dict[str, Any] | None = None


_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            **json_request(TextPrefix)["requestBody"]["content"],
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["config", "weights"],
                    "additionalProperties": False,
                    "properties": {
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "PEFT's adapter_config.json",
                        },
                        "weights": {
                            "type": "string",
                            "format": "binary",
                            "description": "PEFT's adapter_model.safetensors",
                        },
                        "metadata": {
                            "type": "string",
                            "description": "A JSON object; `task_id` chooses the task of a "
                            "MULTITASK_PROMPT_TUNING prefix.",
                        },
                    },
                }
            },
        },
    }
}

Warm = Annotated[
    bool,
    Query(description="Load it into this server's KV pool at once; the upload never fails by it."),
]
Begin = Callable[[], AbstractContextManager[tuple[CatalogTransaction, Published]]]
"""Starts a publish of the store; the version is committed at the end of its block."""

Content = tuple[str | bytes | Path | Mapping[str, Any] | None, ...]
"""The kind of an upload, and all that distinguishes one of the same kind and name from another."""

IdempotencyKey = Annotated[
    str | None,
    Header(description="The same key with the same upload gets the same response, for a day."),
]


@router.put(
    "/{name}",
    response_model=PrefixManifest,
    responses={
        200: {"description": "The same bytes were there already, as this version."},
        201: {"description": "A new version.", "model": PrefixManifest},
    },
    openapi_extra=_UPLOAD,
)
async def put_prefix(
    *,
    request: Request,
    response: Response,
    name: str,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    idempotency: IdempotencyDep,
    limiter: LimiterDep,
    limits: BodyLimitsDep,
    drain_state: DrainStateDep,
    principal: Writer,
    actor: Acting,
    warm: Warm = False,
    idempotency_key: IdempotencyKey = None,
) -> PrefixManifest:
    """Upload a prefix: PEFT's two files as multipart, or a text as JSON. Durable on return."""
    headers = await run_in_threadpool(limiter.count, principal.tenant, principal.quota)
    response.headers.update(headers)
    publish = partial(
        _publish_once,
        name,
        idempotency=idempotency,
        principal=principal,
        actor=actor,
        key=idempotency_key,
    )
    replay, replayed = await _receive_and_publish(
        request, name, publish, store=store, served=served, limits=limits, principal=principal
    )
    response.status_code = replay.status
    if replayed:
        response.headers["idempotency-replayed"] = "true"
    manifest = PrefixManifest.model_validate(replay.body)
    if warm:
        await run_in_threadpool(
            try_warm,
            f"{manifest.name}@{manifest.version}",
            principal,
            store=store,
            engine=engine,
            served=served,
            drain_state=drain_state,
        )
    return manifest


async def _receive_and_publish(
    request: Request,
    name: str,
    publish: Callable[[Begin, Content], tuple[Replay, bool]],
    *,
    store: PrefixStore,
    served: ServedModel,
    limits: BodyLimits,
    principal: Principal,
) -> tuple[Replay, bool]:
    """Receive the body of either content type and ``publish`` it; raise BadRequest for another."""
    base, limit = served.base, principal.quota.max_virtual_tokens
    if limit is not None:  # the tenant's own limit of virtual tokens, where it is lower
        base = replace(base, max_virtual_tokens=min(limit, base.max_virtual_tokens))
    options: dict[str, Any] = {
        "tenant": principal.tenant,
        "name": name,
        "base": base,
        "creator": principal.key_id,
    }
    kind = media_type(request)
    if kind == "multipart/form-data":
        async with received(
            request,
            small=("config", "metadata"),
            file="weights",
            folder=limits.upload_dir,
            limit=limits.max_prefix_bytes,
        ) as upload:
            config, metadata, task_id = _parse_parts(upload)
            begin = partial(
                store.publish_peft,
                config=config,
                weights=upload.file,
                metadata=metadata,
                task_id=task_id,
                **options,
            )
            content: Content = ("peft", config, upload.file, metadata)
            return await run_in_threadpool(publish, begin, content)
    if kind == "application/json":
        body = parse_json(TextPrefix, await read_capped(request, limits.max_body_bytes))
        begin = partial(
            store.publish_text,
            text=body.text,
            metadata=body.metadata,
            count_tokens=served.count_prefix_tokens,
            **options,
        )
        content = ("text", body.text.encode(), body.metadata)
        return await run_in_threadpool(publish, begin, content)
    raise BadRequest(
        "expected the content type multipart/form-data (parts config, weights and optionally "
        f"metadata) or application/json (a text); received {kind[:80]!a}",
        code="unsupported_media_type",
    )


def _publish_once(
    name: str,
    begin: Begin,
    content: Content,
    *,
    idempotency: Idempotency,
    principal: Principal,
    actor: Actor,
    key: str | None,
) -> tuple[Replay, bool]:
    """The response to an upload, and whether it is that of an earlier request under the same
    Idempotency-Key. Blocking. Raises as the store does, QuotaExceeded, Conflict."""
    tenant, digest = principal.tenant, ""
    if key is not None:
        check_key(key)
        kind, *parts = content
        digest = _request_digest(kind, name, *parts)
        earlier = idempotency.find(tenant, key, request_digest=digest)
        if earlier is not None:
            return earlier, True
    try:
        with begin() as (tx, published):
            manifest, created = published.manifest, published.created
            if created:
                check_stored(tx.connection, tenant, principal.quota)
            record(
                tx.connection,
                Action.PREFIX_PUBLISH,
                actor=actor,
                tenant=tenant,
                subject=name,
                detail={"version": manifest.version, "digest": manifest.digest, "created": created},
            )
            body = PrefixManifest.model_validate(manifest).model_dump(mode="json")
            replay = Replay(201 if created else 200, body)
            if key is not None:
                idempotency.keep(tx.connection, tenant, key, request_digest=digest, replay=replay)
    except IntegrityError:
        # A concurrent request under the same key was faster: return its response.
        if key is None:
            raise
        earlier = idempotency.find(tenant, key, request_digest=digest)
        if earlier is None:
            raise
        return earlier, True
    return replay, False


def _request_digest(*parts: str | bytes | Path | Mapping[str, Any] | None) -> str:
    """SHA-256 of the name and the content of an upload; each part is preceded by its length."""
    total = hashlib.sha256()
    for part in parts:
        match part:
            case bytes():
                raw = part
            case str():
                raw = part.encode()
            case Path():
                raw = sha256_of(part).encode()
            case _:
                raw = json.dumps(part, sort_keys=True).encode()
        total.update(len(raw).to_bytes(8, "big") + raw)
    return total.hexdigest()


def _parse_parts(upload: Upload) -> tuple[bytes, dict[str, Any] | None, int | None]:
    """Config, metadata and its ``task_id``. Raises BadRequest, Unprocessable."""
    for part in ("config", "weights"):
        if part not in upload.names:
            raise BadRequest(f"the part '{part}' is missing", code="missing_part", param=part)
    config, raw = upload.parts["config"], upload.parts.get("metadata")
    if raw is None:
        return config, None, None
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise Unprocessable(
            "expected the part 'metadata' to be a JSON object",
            code="malformed_metadata",
            param="metadata",
        )
    task_id = metadata.get("task_id")
    if task_id is not None and (type(task_id) is not int or task_id < 0):
        raise Unprocessable(
            "expected metadata.task_id to be a whole number from 0",
            code="malformed_metadata",
            param="metadata.task_id",
        )
    return config, metadata, task_id
