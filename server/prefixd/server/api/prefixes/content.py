"""GET /v1/prefixes/{name}/versions/{version}/content: the stored file, whole or a part of it."""

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from prefixd.server.api.catalog_calls import CatalogRoute, takes_long
from prefixd.server.api.conditions import ConditionsDep, not_modified
from prefixd.server.api.dependencies import Reader, ServedDep, StoreDep
from prefixd.server.api.generate.members import check_intact
from prefixd.server.api.prefixes.routes import Version
from prefixd.server.api.ranged_file import RangedFile, file_responses
from prefixd.store.store import Manifest

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)


class StoredFile(RangedFile):
    """The file of a version."""

    def __init__(
        self,
        path: FilePath,
        manifest: Manifest,
        *,
        status_code: int = 200,  # where FastAPI looks for the status in the OpenAPI document
    ) -> None:
        super().__init__(
            path,
            size=manifest.size_bytes,
            modified=int(manifest.created_at.timestamp()),
            filename=f"{manifest.name}-{manifest.version}.prefix",
            headers={"x-prefixd-prefix-digest": manifest.digest, "etag": content_tag(manifest)},
            status_code=status_code,
        )


def content_tag(manifest: Manifest) -> str:
    """The tag of the file of a version: its digest, as a strong tag."""
    return f'"{manifest.digest}"'


_DIGEST = {"description": "The SHA-256 of the file.", "schema": {"type": "string"}}
_RESPONSES = file_responses({"x-prefixd-prefix-digest": _DIGEST})


@router.get(
    "/{name}/versions/{version}/content",
    response_class=StoredFile,
    responses=_RESPONSES,
)
@takes_long
def get_content(
    *,
    request: Request,
    name: str,
    version: Version,
    store: StoreDep,
    served: ServedDep,
    principal: Reader,
    conditions: ConditionsDep,
    range_: Annotated[str | None, Header(alias="Range", description="bytes=0-99")] = None,
    if_range: Annotated[
        str | None, Header(description="Answer Range only if the file has this ETag.")
    ] = None,
) -> Response:
    """The stored artifact, byte for byte; its SHA-256 is the digest, and its ETag."""
    del range_, if_range  # for the OpenAPI document; StoredFile reads them
    manifest = store.manifest(tenant=principal.tenant, name=name, version=version, base=served.base)
    tag = content_tag(manifest)
    if conditions.unchanged(tag):
        return not_modified(tag)
    path = FilePath()
    if request.state.is_head:
        check_intact(manifest)
    else:
        path = store.fetch(tenant=principal.tenant, digest=manifest.digest)
    return StoredFile(path, manifest)
