"""GET /v1/prefixes/{name}/versions/{version}/content: the stored file, whole or a part of it."""

import os
import re
from pathlib import Path as FilePath
from stat import S_IFREG
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from prefixd.server.api.catalog_calls import CatalogRoute, takes_long
from prefixd.server.api.conditions import READ, ConditionsDep, not_modified
from prefixd.server.api.dependencies import Reader, ServedDep, StoreDep
from prefixd.server.api.error_responses import ErrorBody
from prefixd.server.api.generate.resolver import check_intact
from prefixd.server.api.prefixes.routes import Version
from prefixd.server.errors import BadRequest, RangeNotSatisfiable
from prefixd.store.store import Manifest

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)

_RANGE = re.compile(r"([0-9]{0,4000})-([0-9]{0,4000})")


class StoredFile(FileResponse):
    """The file of a version with a strong tag, and parts of it by RFC 9110. For HEAD nothing is
    read, so ``path`` may be missing."""

    def __init__(
        self,
        path: FilePath,
        manifest: Manifest,
        *,
        status_code: int = 200,  # where FastAPI looks for the status in the OpenAPI document
    ) -> None:
        at = int(manifest.created_at.timestamp())
        size = manifest.size_bytes
        super().__init__(
            path,
            status_code,
            headers={"x-prefixd-prefix-digest": manifest.digest, "etag": content_tag(manifest)},
            media_type="application/octet-stream",
            filename=f"{manifest.name}-{manifest.version}.prefix",
            # From the catalog: equal for every copy of the file.
            stat_result=os.stat_result((S_IFREG, 0, 0, 1, 0, 0, size, at, at, at)),
        )
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file. Raises BadRequest and RangeNotSatisfiable before anything is sent."""
        if scope["state"]["is_head"]:
            scope = {**scope, "method": "HEAD"}
        await super().__call__(self._with_valid_range(scope), receive, send)

    def _with_valid_range(self, scope: Scope) -> Scope:
        """``scope`` with only the satisfiable ranges, or without any where the whole file is to be
        sent."""
        headers = Headers(scope=scope)
        wanted, if_range = headers.get("range"), headers.get("if-range")
        kept = [pair for pair in headers.raw if pair[0] not in {b"range", b"if-range"}]
        # Never a date: two files within one second have the same.
        is_current = if_range is None or if_range == self.headers["etag"]
        if wanted is not None and scope["method"] == "GET" and is_current:
            ranges = satisfiable(wanted, size=self._size)
            if ranges:
                kept.append((b"range", f"bytes={','.join(ranges)}".encode()))
        return {**scope, "headers": kept}


def content_tag(manifest: Manifest) -> str:
    """The tag of the file of a version: its digest, as a strong tag."""
    return f'"{manifest.digest}"'


def satisfiable(header: str, *, size: int) -> list[str]:
    """The ranges of a Range header that a file of ``size`` bytes has; none for a unit other than
    bytes, which is ignored. Raises BadRequest, RangeNotSatisfiable."""
    unit, equals, listed = header.partition("=")
    if equals and unit.strip().lower() != "bytes":
        return []
    ranges = [part.strip(" \t") for part in listed.split(",") if part.strip(" \t")]
    if not ranges or not all(_is_range(part) for part in ranges):
        raise BadRequest("expected a Range like bytes=0-99; received another", code="invalid_range")
    kept = [part for part in ranges if _begins_within(part, size)]
    if not kept:
        raise RangeNotSatisfiable(
            f"the file has {size} bytes; the range starts after its end",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return kept


def _is_range(part: str) -> bool:
    match = _RANGE.fullmatch(part)
    if match is None or part == "-":
        return False
    first, last = match.groups()
    return not (first and last) or int(first) <= int(last)


def _begins_within(part: str, size: int) -> bool:
    first, _, last = part.partition("-")
    return int(first) < size if first else int(last) > 0


def _header(text: str) -> dict[str, Any]:
    return {"description": text, "schema": {"type": "string"}}


_BYTES = {"schema": {"type": "string", "format": "binary"}}
_FILE_HEADERS = READ[200]["headers"] | {
    "Accept-Ranges": _header("bytes"),
    "x-prefixd-prefix-digest": _header("The SHA-256 of the file."),
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": _BYTES}, "headers": _FILE_HEADERS},
    206: {
        "description": "The parts in Range.",
        "content": {"application/octet-stream": _BYTES, "multipart/byteranges": _BYTES},
        "headers": _FILE_HEADERS
        | {"Content-Range": _header("Of a single part: bytes FIRST-LAST/SIZE.")},
    },
    304: READ[304],
    416: {
        "model": ErrorBody,
        "description": "The file has no such part.",
        "headers": {"Content-Range": _header("bytes */SIZE")},
    },
}


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
