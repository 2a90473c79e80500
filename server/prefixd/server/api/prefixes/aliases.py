"""/v1/prefixes/{name}/aliases/{alias}: movable names for a version."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import BeforeValidator

from prefixd.server.api.body import StrictModel, json_body, json_request
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.conditions import READ, WITH_TAG, ConditionsDep, version_tag
from prefixd.server.api.dependencies import Acting, EngineDep, Reader, ServedDep, StoreDep, Writer
from prefixd.server.api.prefixes.routes import shown_version
from prefixd.server.api.prefixes.schemas import PrefixDetails, PrefixManifest
from prefixd.server.api.repeats import RepeatableDep
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Keep, Replay
from prefixd.server.tenants.usage import check_quota
from prefixd.store.artifact.strict import shown
from prefixd.store.names import LATEST, MAX_VERSION, check_alias

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)


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


@router.get("/{name}/aliases/{alias}", response_model=PrefixDetails, responses=READ)
def get_alias(
    *,
    name: str,
    alias: str,
    response: Response,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    principal: Reader,
    conditions: ConditionsDep,
) -> PrefixDetails | Response:
    """The version that an alias means now, with its ETag."""
    if alias != LATEST:
        check_alias(alias)
    manifest = store.manifest(tenant=principal.tenant, name=name, version=alias, base=served.base)
    return shown_version(
        manifest, version_tag(manifest), response, store=store, engine=engine, conditions=conditions
    )


@router.put(
    "/{name}/aliases/{alias}",
    response_model=PrefixManifest,
    responses=WITH_TAG,
    openapi_extra=json_request(AliasTarget),
)
def put_alias(
    *,
    name: str,
    alias: str,
    response: Response,
    store: StoreDep,
    served: ServedDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    repeat: RepeatableDep,
    body: Annotated[AliasTarget, Depends(json_body(AliasTarget))],
) -> Any:
    """Let `name@alias` mean a version from the next request on. The response has its number.

    The alias `latest` takes any version of the served base, and keeps it until the next upload.
    """
    tenant = principal.tenant

    def change(keep: Keep) -> Replay:
        with store.change(tenant) as tx:
            manifest = tx.set_alias(
                name,
                alias,
                version=body.version,
                base=served.base,
                precondition=conditions.check,
            )
            check_quota(tx.connection, tenant, {"max_aliases": tx.num_aliases_added})
            record(
                tx.connection,
                Action.ALIAS_SET,
                actor=actor,
                tenant=tenant,
                subject=name,
                detail={"alias": alias, "version": manifest.version},
            )
            shown = PrefixManifest.model_validate(manifest).model_dump(mode="json")
            replay = Replay(200, shown, version_tag(manifest))
            keep(tx.connection, replay)
        return replay

    return repeat.once_for(body, change, response)


@router.delete("/{name}/aliases/{alias}", status_code=204)
def delete_alias(
    *,
    name: str,
    alias: str,
    store: StoreDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
) -> None:
    """Delete an alias; the version stays."""
    tenant = principal.tenant
    with store.change(tenant) as tx:
        tx.remove_alias(name, alias, precondition=conditions.check)
        record(
            tx.connection,
            Action.ALIAS_REMOVE,
            actor=actor,
            tenant=tenant,
            subject=name,
            detail={"alias": alias},
        )
