"""PATCH /v1/prefixes/{name}/versions/{version}: the metadata of a version, by RFC 7396."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from prefixd.server.api.body import check_keys, media_type, read_capped
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.conditions import WITH_TAG, ConditionsDep, version_tag
from prefixd.server.api.dependencies import (
    Acting,
    BodyLimitsDep,
    ServedDep,
    StoreDep,
    TemplatesDep,
    Writer,
    authenticated,
)
from prefixd.server.api.prefixes.routes import Version
from prefixd.server.api.prefixes.schemas import PrefixManifest
from prefixd.server.api.rendering.tenant_template import check_renders
from prefixd.server.errors import BadRequest, Unprocessable
from prefixd.server.tenants.audit import Action, record
from prefixd.store.artifact.metadata import MAX_METADATA_BYTES
from prefixd.store.artifact.recipe import TEMPLATE, folded
from prefixd.store.artifact.strict import StrictJsonError, parse_object
from prefixd.store.artifact.template import MAX_TEMPLATE_BYTES

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)

MERGE_PATCH = "application/merge-patch+json"
MAX_PATCH_BYTES = 4 * (MAX_METADATA_BYTES + MAX_TEMPLATE_BYTES)
"""A patch may remove all of the stored metadata and set as much again, with spaces between. Its
field names are kept in the audit log."""

_TYPES = (MERGE_PATCH, "application/json")
_SCHEMA = {"type": "object", "description": "Fields to set; null removes one."}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {media: {"schema": _SCHEMA} for media in _TYPES},
    }
}


async def _patch(
    request: Request, limits: BodyLimitsDep, _principal: Annotated[Any, Depends(authenticated)]
) -> dict[str, Any]:
    """The body. Raises BadRequest, TooLarge, Unprocessable."""
    kind = media_type(request)
    if kind not in _TYPES:
        raise BadRequest(
            f"expected the content type {' or '.join(_TYPES)}; received {kind[:80]!a}",
            code="unsupported_media_type",
        )
    body = await read_capped(request, min(limits.max_body_bytes, MAX_PATCH_BYTES))
    check_keys(body)
    try:
        return parse_object(body)
    except StrictJsonError as error:
        raise Unprocessable(
            f"expected metadata to be a JSON object: {error}",
            code="malformed_metadata",
            param="metadata",
        ) from None


@router.patch(
    "/{name}/versions/{version}",
    response_model=PrefixManifest,
    responses=WITH_TAG,
    openapi_extra=_BODY,
)
def patch_metadata(
    *,
    name: str,
    version: Version,
    response: Response,
    store: StoreDep,
    served: ServedDep,
    templates: TemplatesDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    patch: Annotated[dict[str, Any], Depends(_patch)],
) -> PrefixManifest:
    """Merge an object into the metadata of a version, its recipe too: null removes a field.

    `task_id` and `base_fingerprint` belong to the version and cannot change.
    """
    tenant = principal.tenant
    template = folded(patch).get(TEMPLATE)
    check_renders(template, renderer=templates, served=served, tenant=tenant)
    with store.change(tenant) as tx:
        manifest = tx.merge_metadata(
            name, version, patch, base=served.base, precondition=conditions.check
        )
        record(
            tx.connection,
            Action.PREFIX_METADATA,
            actor=actor,
            tenant=tenant,
            subject=name,
            detail={
                "version": manifest.version,
                "fields": sorted(patch),
                "recipe_revision": manifest.recipe_revision,
            },
        )
    response.headers["ETag"] = version_tag(manifest)
    return PrefixManifest.model_validate(manifest)
