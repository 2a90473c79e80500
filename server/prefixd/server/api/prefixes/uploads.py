"""PUT /v1/prefixes/{name}: a new version, from PEFT's files, a text or a stored file.

The tenant's quotas, the audit entry and the response stored under an idempotency key belong to the
transaction of the version: all of them are written, or none.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection

from prefixd.server.api.body import declared_bytes
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.conditions import WITH_TAG, ConditionsDep, prefix_tag
from prefixd.server.api.dependencies import (
    Acting,
    BodyLimitsDep,
    BoundsDep,
    CatalogAccessDep,
    DiskDep,
    DrainStateDep,
    EngineDep,
    LimiterDep,
    ServedDep,
    StoreDep,
    TemplatesDep,
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
from prefixd.server.api.prefixes.schemas import PrefixManifest, UploadedPrefix
from prefixd.server.api.repeats import Repeatable, RepeatableDep, request_digest
from prefixd.server.api.served import ServedModel
from prefixd.server.api.values import Flag
from prefixd.server.engine.request import PrefixKey
from prefixd.server.errors import Unavailable
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Keep, Replay
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.usage import added_by_publish, check_quota
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.template import num_in_front
from prefixd.store.files import sha256_of
from prefixd.store.store import Published

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)


Warm = Annotated[
    Flag,
    Query(description="Load it into this server's KV pool at once; the upload never fails by it."),
]


@router.put(
    "/{name}",
    response_model=UploadedPrefix,
    responses={
        200: WITH_TAG[200] | {"description": "The same bytes were there already, as this version."},
        201: WITH_TAG[200] | {"description": "A new version.", "model": UploadedPrefix},
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
    repeat: RepeatableDep,
    limiter: LimiterDep,
    tenants: TenantsDep,
    limits: BodyLimitsDep,
    bounds: BoundsDep,
    disk: DiskDep,
    drain_state: DrainStateDep,
    catalog: CatalogAccessDep,
    templates: TemplatesDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    warm: Warm = False,
) -> UploadedPrefix:
    """Upload a prefix: PEFT's two files as multipart, a text as JSON, or a stored file as it is.

    Durable on return.
    """
    headers = await catalog.calls.write(limiter.count, principal.tenant, principal.quota)
    response.headers.update(headers)
    publish = partial(_publish_once, name, repeat=repeat, actor=actor, response=response)
    target = Target(
        name=name,
        store=store,
        served=served,
        templates=templates,
        limits=limits,
        disk=disk,
        principal=principal,
        precondition=conditions.check,
    )
    async with bounds.uploads.hold(principal.tenant):
        await catalog.calls.read(tenants.check_kept, principal.tenant, principal.quota)
        await run_in_threadpool(disk.check, declared_bytes(request))
        async with receive(request, target) as received:
            body = await catalog.long_calls.write(publish, *received)
    manifest = UploadedPrefix.model_validate(body)
    manifest.warnings = _warnings(manifest, served)
    for digest in (manifest.digest, *(member.digest for member in manifest.members)):
        engine.forget_failure(PrefixKey(principal.tenant, digest))
    if warm:
        warm_up = partial(
            try_warm,
            f"{manifest.name}@{manifest.version}",
            principal,
            store=store,
            engine=engine,
            served=served,
            drain_state=drain_state,
        )
        with suppress(Unavailable):  # the upload is durable
            await catalog.calls.read(warm_up)
    return manifest


def _warnings(manifest: PrefixManifest, served: ServedModel) -> list[str]:
    """What a tenant should know of a version on this base. All tokens see an adaption prompt, and
    an ensemble has no virtual tokens but those of its members."""
    kind = Kind(manifest.kind)
    if not kind.takes_positions or kind is Kind.ENSEMBLE:
        return []
    count = manifest.num_virtual_tokens
    is_in_front = num_in_front(manifest.prompt_template, num_virtual_tokens=count) == count
    return served.prefix_warnings(count if is_in_front else None)


def _publish_once(
    name: str,
    begin: Begin,
    content: Content,
    *,
    repeat: Repeatable,
    actor: Actor,
    response: Response,
) -> Any:
    """The body of the response to an upload. Blocking. Raises as the store does, QuotaExceeded,
    Conflict."""
    tenant, digest = repeat.tenant, ""
    if repeat.key is not None:
        kind, *parts = content
        digest = request_digest(*map(_raw, (kind, name, *parts)))

    def change(keep: Keep) -> Replay:
        with begin() as (tx, published):
            if published.created:
                digest_of_blob = published.manifest.digest
                added = added_by_publish(tx.connection, tenant, name, digest_of_blob)
                check_quota(tx.connection, tenant, added)
            _record(tx.connection, published, actor=actor, tenant=tenant, name=name)
            body = PrefixManifest.model_validate(published.manifest).model_dump(mode="json")
            status = 201 if published.created else 200
            replay = Replay(status, body, prefix_tag(published.manifest))
            keep(tx.connection, replay)
        return replay

    return repeat.once(digest, change, response)


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
        detail["recipe_revision"] = published.manifest.recipe_revision
    record(
        connection, Action.PREFIX_PUBLISH, actor=actor, tenant=tenant, subject=name, detail=detail
    )


def _raw(part: str | bytes | Path | Mapping[str, Any] | None) -> bytes:
    """A part of an upload, or for a file its digest."""
    match part:
        case bytes():
            return part
        case str():
            return part.encode()
        case Path():
            return sha256_of(part).encode()
        case _:
            return json.dumps(part, sort_keys=True).encode()
