"""/v1/prefixes: listing, versions and delete."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import Field

from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.conditions import (
    READ,
    Conditions,
    ConditionsDep,
    not_modified,
    prefix_tag,
    version_tag,
)
from prefixd.server.api.dependencies import Acting, EngineDep, Reader, ServedDep, StoreDep, Writer
from prefixd.server.api.prefixes.schemas import (
    PrefixDetails,
    PrefixList,
    PrefixShown,
    VersionList,
)
from prefixd.server.api.values import Reference, WholeNumber
from prefixd.server.engine.engine import Engine
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.references import check_unbound
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.metadata import MAX_LABELS
from prefixd.store.names import LATEST, MAX_VERSION, REFERENCE, parse_reference
from prefixd.store.store import Manifest, PrefixStore

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)


Version = Annotated[Reference, Path(description="A version number, or an alias such as `latest`.")]
VersionNumber = Annotated[WholeNumber, Path(ge=1, le=MAX_VERSION)]
Bases = Annotated[
    Literal["served", "all"], Query(description="Versions for the served base, or for every base.")
]


Labels = Annotated[
    tuple[Annotated[str, Field(json_schema_extra={"pattern": ":"})], ...],
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


@router.get("/{name}", response_model=PrefixDetails, responses=READ)
def get_prefix(
    *,
    reference: Annotated[
        Reference,
        Path(
            alias="name",
            description="`name`, `name@3` or `name@alias`.",
            json_schema_extra={"pattern": REFERENCE},
        ),
    ],
    response: Response,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    principal: Reader,
    conditions: ConditionsDep,
) -> PrefixDetails | Response:
    """The version that `name`, `name@3` or `name@alias` means now.

    `name` is its latest version for the served base; a number or an alias may mean another base's.
    The ETag is that of the prefix for `name`, else that of the version.
    """
    manifest = store.resolve(tenant=principal.tenant, reference=reference, base=served.base)
    is_prefix = parse_reference(reference).alias == LATEST
    tag = prefix_tag(manifest) if is_prefix else version_tag(manifest)
    return shown_version(manifest, tag, response, store=store, engine=engine, conditions=conditions)


@router.get("/{name}/versions/{version}", response_model=PrefixDetails, responses=READ)
def get_version(
    *,
    name: str,
    version: Version,
    response: Response,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    principal: Reader,
    conditions: ConditionsDep,
) -> PrefixDetails | Response:
    """One version, with its ETag."""
    manifest = store.manifest(tenant=principal.tenant, name=name, version=version, base=served.base)
    return shown_version(
        manifest, version_tag(manifest), response, store=store, engine=engine, conditions=conditions
    )


def shown_version(
    manifest: Manifest,
    tag: str,
    response: Response,
    *,
    store: PrefixStore,
    engine: Engine,
    conditions: Conditions,
) -> PrefixDetails | Response:
    """The response to a GET of a version that has ``tag`` now."""
    if conditions.unchanged(tag):
        return not_modified(tag)
    response.headers["ETag"] = tag
    agreement = store.agreement(manifest) if manifest.kind is Kind.ENSEMBLE else {}
    return PrefixDetails.of(PrefixShown.now(manifest, engine), agreement)


@router.delete("/{name}", status_code=204)
def delete_prefix(
    name: str, store: StoreDep, principal: Writer, actor: Acting, conditions: ConditionsDep
) -> None:
    """Delete a prefix with all its versions and aliases. Running requests keep their version."""
    tenant = principal.tenant
    with store.change(tenant) as tx:
        tx.delete(name, precondition=conditions.check)
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
    conditions: ConditionsDep,
) -> None:
    """Delete one version that no alias, pin, binding or default refers to. Running requests keep
    it; compositions with it cannot be used any more."""
    with store.change(principal.tenant) as tx:
        removed = tx.delete_version(name, version, base=served.base, precondition=conditions.check)
        check_unbound(tx.connection, removed)
        record(
            tx.connection,
            Action.VERSION_DELETE,
            actor=actor,
            tenant=principal.tenant,
            subject=name,
            detail={"version": version, "digest": removed.manifest.digest},
        )
