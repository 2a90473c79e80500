"""/v1/prefixes: look, name and delete. ``routes_uploads`` has the upload, ``routes_residency`` what
keeps a prefix in the pool."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from prefixd.server.api.auth import Acting, Reader, Writer
from prefixd.server.api.body import StrictModel, json_body, json_request
from prefixd.server.api.parts import AuditDep, EngineDep, StoreDep
from prefixd.server.api.prefixes.audit_hook import AuditHook
from prefixd.server.api.prefixes.manifests import (
    PrefixList,
    PrefixManifest,
    PrefixShown,
    VersionList,
)
from prefixd.server.api.prefixes.stored_file import StoredFile
from prefixd.server.tenants.audit import Action

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])

Version = Annotated[int, Path(ge=1, le=2**31 - 1)]


class AliasTarget(StrictModel):
    """Which version an alias shall mean."""

    version: int = Field(ge=1, le=2**31 - 1)


@router.get("", response_model=PrefixList)
def list_prefixes(
    store: StoreDep,
    engine: EngineDep,
    principal: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> PrefixList:
    """The caller's prefixes by name, each at its latest version."""
    page = store.list(tenant=principal.tenant, limit=limit, after=after)
    return PrefixList(
        data=[PrefixShown.now(one, engine) for one in page.manifests],
        next_after=page.next_after,
    )


@router.get("/{reference}", response_model=PrefixShown)
def get_prefix(
    reference: str, store: StoreDep, engine: EngineDep, principal: Reader
) -> PrefixShown:
    """The version that `name`, `name@3` or `name@alias` means now."""
    found = store.resolve(tenant=principal.tenant, reference=reference)
    return PrefixShown.now(found, engine)


@router.delete("/{name}", status_code=204)
def delete_prefix(
    name: str, store: StoreDep, audit: AuditDep, principal: Writer, actor: Acting
) -> None:
    """Forget a prefix with all its versions and aliases. Requests that run keep what they have."""
    noted = AuditHook(audit, actor, Action.PREFIX_DELETE, principal.tenant, name, {})
    store.delete(tenant=principal.tenant, name=name, within=noted)


@router.get("/{name}/versions", response_model=VersionList)
def list_versions(
    *,
    name: str,
    store: StoreDep,
    engine: EngineDep,
    principal: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> VersionList:
    """Versions, newest first; `next_before` is what `before` takes for older ones."""
    found = store.versions(tenant=principal.tenant, name=name, limit=limit + 1, before=before)
    more = found[limit - 1].version if len(found) > limit else None
    return VersionList(
        data=[PrefixShown.now(one, engine) for one in found[:limit]], next_before=more
    )


@router.get(
    "/{name}/versions/{version}/content",
    response_class=StoredFile,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def get_content(name: str, version: Version, store: StoreDep, principal: Reader) -> StoredFile:
    """The stored artifact, byte for byte; its SHA-256 is the digest."""
    manifest = store.manifest(tenant=principal.tenant, name=name, version=version)
    path = store.fetch(tenant=principal.tenant, digest=manifest.digest)
    return StoredFile(
        path,
        media_type="application/octet-stream",
        filename=f"{manifest.name}-{manifest.version}.prefix",
        headers={"x-prefixd-prefix-digest": manifest.digest},
    )


@router.put(
    "/{name}/aliases/{alias}",
    response_model=PrefixManifest,
    openapi_extra=json_request(AliasTarget),
)
async def put_alias(
    *,
    name: str,
    alias: str,
    store: StoreDep,
    audit: AuditDep,
    principal: Writer,
    actor: Acting,
    body: Annotated[AliasTarget, Depends(json_body(AliasTarget))],
) -> PrefixManifest:
    """Let `name@alias` mean a version from the next request on."""
    detail = {"alias": alias, "version": body.version}
    manifest = await run_in_threadpool(
        store.set_alias,
        tenant=principal.tenant,
        name=name,
        alias=alias,
        version=body.version,
        within=AuditHook(audit, actor, Action.ALIAS_SET, principal.tenant, name, detail),
    )
    return PrefixManifest.of(manifest)


@router.delete("/{name}/aliases/{alias}", status_code=204)
def delete_alias(
    *, name: str, alias: str, store: StoreDep, audit: AuditDep, principal: Writer, actor: Acting
) -> None:
    """Forget an alias; the version stays."""
    detail = {"alias": alias}
    noted = AuditHook(audit, actor, Action.ALIAS_REMOVE, principal.tenant, name, detail)
    store.remove_alias(tenant=principal.tenant, name=name, alias=alias, within=noted)
