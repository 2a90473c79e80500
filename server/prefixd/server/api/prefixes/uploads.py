"""PUT /v1/prefixes/{name}: a new version, from PEFT's files, a text or a stored file.

The tenant's quotas, the audit entry and the response stored under an idempotency key belong to the
transaction of the version: all of them are written, or none.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from prefixd.server.api.body import declared_bytes
from prefixd.server.api.conditions import WITH_TAG, ConditionsDep, prefix_tag
from prefixd.server.api.dependencies import (
    Acting,
    BodyLimitsDep,
    BoundsDep,
    DiskDep,
    DrainStateDep,
    EngineDep,
    IdempotencyDep,
    LimiterDep,
    ServedDep,
    StoreDep,
    TenantsDep,
    Writer,
)
from prefixd.server.api.prefixes.receiving import (
    UPLOAD_BODY,
    Begin,
    Content,
    Target,
    receive,
)
from prefixd.server.api.prefixes.residency import try_warm
from prefixd.server.api.prefixes.schemas import PrefixManifest
from prefixd.server.api.values import Flag
from prefixd.server.engine.request import PrefixKey
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Idempotency, Replay, check_key
from prefixd.server.tenants.principal import Actor, Principal
from prefixd.server.tenants.usage import added_by_publish, check_quota
from prefixd.store.files import sha256_of
from prefixd.store.store import Published

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])


Warm = Annotated[
    Flag,
    Query(description="Load it into this server's KV pool at once; the upload never fails by it."),
]
IdempotencyKey = Annotated[
    str | None,
    Header(description="The same key with the same upload gets the same response, for a day."),
]


@router.put(
    "/{name}",
    response_model=PrefixManifest,
    responses={
        200: WITH_TAG[200] | {"description": "The same bytes were there already, as this version."},
        201: WITH_TAG[200] | {"description": "A new version.", "model": PrefixManifest},
    },
    openapi_extra=UPLOAD_BODY,
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
    tenants: TenantsDep,
    limits: BodyLimitsDep,
    bounds: BoundsDep,
    disk: DiskDep,
    drain_state: DrainStateDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    warm: Warm = False,
    idempotency_key: IdempotencyKey = None,
) -> PrefixManifest:
    """Upload a prefix: PEFT's two files as multipart, a text as JSON, or a stored file as it is.

    Durable on return.
    """
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
    target = Target(
        name=name,
        store=store,
        served=served,
        limits=limits,
        disk=disk,
        principal=principal,
        precondition=conditions.check,
    )
    async with bounds.uploads.hold(principal.tenant):
        await run_in_threadpool(tenants.check_kept, principal.tenant, principal.quota)
        await run_in_threadpool(disk.check, declared_bytes(request))
        async with receive(request, target) as received:
            replay, replayed = await run_in_threadpool(publish, *received)
    response.status_code = replay.status
    if replay.etag is not None:
        response.headers["ETag"] = replay.etag
    if replayed:
        response.headers["idempotency-replayed"] = "true"
    manifest = PrefixManifest.model_validate(replay.body)
    engine.forget_failure(PrefixKey(principal.tenant, manifest.digest))
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
            if published.created:
                digest_of_blob = published.manifest.digest
                added = added_by_publish(tx.connection, tenant, name, digest_of_blob)
                check_quota(tx.connection, tenant, added)
            _record(tx.connection, published, actor=actor, tenant=tenant, name=name)
            body = PrefixManifest.model_validate(published.manifest).model_dump(mode="json")
            status = 201 if published.created else 200
            replay = Replay(status, body, prefix_tag(published.manifest))
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


def _record(
    connection: Connection, published: Published, *, actor: Actor, tenant: str, name: str
) -> None:
    detail: dict[str, Any] = {
        "version": published.manifest.version,
        "digest": published.manifest.digest,
        "created": published.created,
    }
    if published.metadata_changed:
        detail["metadata"] = "replaced"
    record(
        connection, Action.PREFIX_PUBLISH, actor=actor, tenant=tenant, subject=name, detail=detail
    )


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
