"""/v1/prefixes: listing, versions, stored artifacts, aliases and delete."""

import os
from http import HTTPStatus
from pathlib import Path as FilePath
from stat import S_IFREG
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import BeforeValidator
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from prefixd.server.api.body import StrictModel, json_body, json_request
from prefixd.server.api.dependencies import Acting, EngineDep, Reader, ServedDep, StoreDep, Writer
from prefixd.server.api.generate.resolver import check_intact
from prefixd.server.api.prefixes.schemas import (
    PrefixList,
    PrefixManifest,
    PrefixShown,
    VersionList,
)
from prefixd.server.api.values import Reference, WholeNumber
from prefixd.server.errors import BadRequest, RangeNotSatisfiable
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.bindings import check_unbound
from prefixd.server.tenants.usage import check_quota
from prefixd.store.artifact.config import MAX_LABELS
from prefixd.store.artifact.strict import shown
from prefixd.store.names import MAX_VERSION
from prefixd.store.store import Manifest

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])


Version = Annotated[Reference, Path(description="A version number, or an alias such as `latest`.")]
VersionNumber = Annotated[WholeNumber, Path(ge=1, le=MAX_VERSION)]
Bases = Annotated[
    Literal["served", "all"], Query(description="Versions for the served base, or for every base.")
]


Labels = Annotated[
    tuple[str, ...],
    Query(max_length=MAX_LABELS, description="NAME:VALUE. Several: all of them must match."),
]


def parse_label(text: str) -> tuple[str, str]:
    """The name and the value in ``name:value``; raise BadRequest."""
    name, colon, value = text.partition(":")
    if not colon:
        raise BadRequest(
            f"expected a label as NAME:VALUE, such as team:care; received {text[:80]!a}",
            param="label",
        )
    return name, value


def _number_or_alias(value: object) -> object:
    if type(value) is int and 1 <= value <= MAX_VERSION:
        return value
    if isinstance(value, str) and not value.isdigit():
        return value
    raise ValueError(
        "'version': expected a version number from 1, or an alias such as \"latest\"; "
        f"received {shown(value)}"
    )


class AliasTarget(StrictModel):
    """The version an alias will mean: a number, or another alias, for the version that it means
    now."""

    version: Annotated[int | str, BeforeValidator(_number_or_alias)]


class StoredFile(FileResponse):
    """Starlette's, but an invalid Range is refused with our error body, not in plain text. For HEAD
    nothing is read: ``path`` may be missing if ``stat_result`` is there."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file. Raises BadRequest and RangeNotSatisfiable before anything is sent."""
        if scope["state"]["is_head"]:
            scope = {**scope, "method": "HEAD"}

        async def refuse_or_send(message: Message) -> None:
            match message.get("status"):
                case HTTPStatus.BAD_REQUEST:
                    raise BadRequest(
                        "expected a Range like bytes=0-99; received another", code="invalid_range"
                    )
                case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    content_range = Headers(raw=message["headers"])["content-range"]
                    size = content_range.rpartition("/")[2]
                    raise RangeNotSatisfiable(
                        f"the file has {size} bytes; the range starts after its end",
                        headers={"Content-Range": content_range},
                    )
            await send(message)

        await super().__call__(scope, receive, refuse_or_send)


@router.get("", response_model=PrefixList)
def list_prefixes(
    *,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    principal: Reader,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=128)] = None,
    base: Bases = "served",
    label: Labels = (),
) -> PrefixList:
    """The caller's prefixes by name, each at its latest version for the served base.

    With `label=team:care`, only those that have this label; several must all match. With
    `base=all`, at the latest version for each of its bases; `limit` then counts names.
    """
    of_base = served.base if base == "served" else None
    labels = [parse_label(text) for text in label]
    page = store.list(
        tenant=principal.tenant, base=of_base, labels=labels, limit=limit, after=after
    )
    return PrefixList(
        data=[PrefixShown.now(manifest, engine) for manifest in page.manifests],
        next_after=page.next_after,
    )


@router.get("/{name}", response_model=PrefixShown)
def get_prefix(
    reference: Annotated[
        Reference, Path(alias="name", description="`name`, `name@3` or `name@alias`.")
    ],
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    principal: Reader,
) -> PrefixShown:
    """The version that `name`, `name@3` or `name@alias` means now.

    `name` is its latest version for the served base; a number or an alias may mean another base's.
    """
    manifest = store.resolve(tenant=principal.tenant, reference=reference, base=served.base)
    return PrefixShown.now(manifest, engine)


@router.delete("/{name}", status_code=204)
def delete_prefix(name: str, store: StoreDep, principal: Writer, actor: Acting) -> None:
    """Delete a prefix with all its versions and aliases. Running requests keep their version."""
    tenant = principal.tenant
    with store.change(tenant) as tx:
        tx.delete(name)
        record(
            tx.connection,
            Action.PREFIX_DELETE,
            actor=actor,
            tenant=tenant,
            subject=name,
        )


@router.get("/{name}/versions", response_model=VersionList)
def list_versions(
    *,
    name: str,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    principal: Reader,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
    before: Annotated[WholeNumber | None, Query(ge=1, le=2**31 - 1)] = None,
    base: Bases = "served",
) -> VersionList:
    """Versions for the served base, or with `base=all` for any, newest first; `next_before` is what
    `before` takes for older ones."""
    of_base = served.base if base == "served" else None
    page = store.versions(
        tenant=principal.tenant, name=name, base=of_base, limit=limit + 1, before=before
    )
    more = page[limit - 1].version if len(page) > limit else None
    return VersionList(
        data=[PrefixShown.now(manifest, engine) for manifest in page[:limit]], next_before=more
    )


@router.delete("/{name}/versions/{version}", status_code=204)
def delete_version(
    *,
    name: str,
    version: VersionNumber,
    store: StoreDep,
    served: ServedDep,
    principal: Writer,
    actor: Acting,
) -> None:
    """Delete one version that no alias, pin, binding or default refers to. Running requests keep
    it."""
    with store.change(principal.tenant) as tx:
        removed = tx.delete_version(name, version, base=served.base)
        check_unbound(tx.connection, removed)
        record(
            tx.connection,
            Action.VERSION_DELETE,
            actor=actor,
            tenant=principal.tenant,
            subject=name,
            detail={"version": version, "digest": removed.manifest.digest},
        )


@router.get(
    "/{name}/versions/{version}/content",
    response_class=StoredFile,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def get_content(
    *,
    request: Request,
    name: str,
    version: Version,
    store: StoreDep,
    served: ServedDep,
    principal: Reader,
) -> StoredFile:
    """The stored artifact, byte for byte; its SHA-256 is the digest."""
    manifest = store.manifest(tenant=principal.tenant, name=name, version=version, base=served.base)
    path = FilePath()
    if request.state.is_head:
        check_intact(manifest)
    else:
        path = store.fetch(tenant=principal.tenant, digest=manifest.digest)
    return StoredFile(
        path,
        media_type="application/octet-stream",
        filename=f"{manifest.name}-{manifest.version}.prefix",
        headers={"x-prefixd-prefix-digest": manifest.digest},
        stat_result=_stat(manifest),
    )


def _stat(manifest: Manifest) -> os.stat_result:
    """The headers of a stored file, from the catalog: equal for every copy of it."""
    at = int(manifest.created_at.timestamp())
    return os.stat_result((S_IFREG, 0, 0, 1, 0, 0, manifest.size_bytes, at, at, at))


@router.put(
    "/{name}/aliases/{alias}",
    response_model=PrefixManifest,
    openapi_extra=json_request(AliasTarget),
)
def put_alias(
    *,
    name: str,
    alias: str,
    store: StoreDep,
    served: ServedDep,
    principal: Writer,
    actor: Acting,
    body: Annotated[AliasTarget, Depends(json_body(AliasTarget))],
) -> PrefixManifest:
    """Let `name@alias` mean a version from the next request on. The response has its number.

    The alias `latest` takes any version of the served base, and keeps it until the next upload.
    """
    tenant = principal.tenant
    with store.change(tenant) as tx:
        manifest = tx.set_alias(name, alias, version=body.version, base=served.base)
        check_quota(tx.connection, tenant, {"max_aliases": tx.num_aliases_added})
        record(
            tx.connection,
            Action.ALIAS_SET,
            actor=actor,
            tenant=tenant,
            subject=name,
            detail={"alias": alias, "version": manifest.version},
        )
    return PrefixManifest.model_validate(manifest)


@router.delete("/{name}/aliases/{alias}", status_code=204)
def delete_alias(
    *, name: str, alias: str, store: StoreDep, principal: Writer, actor: Acting
) -> None:
    """Delete an alias; the version stays."""
    tenant = principal.tenant
    with store.change(tenant) as tx:
        tx.remove_alias(name, alias)
        record(
            tx.connection,
            Action.ALIAS_REMOVE,
            actor=actor,
            tenant=tenant,
            subject=name,
            detail={"alias": alias},
        )
