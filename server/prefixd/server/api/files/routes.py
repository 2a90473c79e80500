"""/v1/files: the inputs and outputs of batches, in OpenAI's shape.

The tenant's quotas, the audit entry and the response stored under an idempotency key belong to the
transaction of the file.
"""

import re
from datetime import timedelta
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.body import declared_bytes, media_type
from prefixd.server.api.catalog_calls import CatalogRoute, takes_long
from prefixd.server.api.conditions import ConditionsDep, not_modified
from prefixd.server.api.dependencies import (
    Acting,
    BatchesDep,
    BatchOptionsDep,
    BodyLimitsDep,
    BoundsDep,
    CatalogAccessDep,
    DiskDep,
    Generator,
    LimiterDep,
    StoreDep,
    TenantsDep,
)
from prefixd.server.api.files.schemas import (
    LEAST_KEPT_S,
    MOST_KEPT_S,
    UPLOAD_BODY,
    FileDeleted,
    FileList,
    FileShown,
)
from prefixd.server.api.multipart import Upload, received
from prefixd.server.api.ranged_file import RangedFile, file_responses
from prefixd.server.api.repeats import Repeatable, RepeatableDep, request_digest
from prefixd.server.api.values import WholeNumber
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Keep, Replay
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.usage import check_quota
from prefixd.store.catalog.blob_rows import BlobCollected
from prefixd.store.file_store import FileRecord, FileStore, Purpose
from prefixd.store.files import sha256_of

upload_router = APIRouter(prefix="/v1/files", tags=["files"], route_class=CatalogRoute)
router = APIRouter(prefix="/v1/files", tags=["files"], route_class=CatalogRoute)

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FILENAME_CHARACTERS = 255
_ATTEMPTS = 3


@upload_router.post("", response_model=FileShown, openapi_extra=UPLOAD_BODY)
async def create_file(
    *,
    request: Request,
    response: Response,
    store: StoreDep,
    repeat: RepeatableDep,
    limiter: LimiterDep,
    tenants: TenantsDep,
    limits: BodyLimitsDep,
    options: BatchOptionsDep,
    bounds: BoundsDep,
    disk: DiskDep,
    catalog: CatalogAccessDep,
    principal: Generator,
    actor: Acting,
) -> Any:
    """Upload the input of a batch. Durable on return."""
    headers = await catalog.calls.write(limiter.count, principal.tenant, principal.quota)
    response.headers.update(headers)
    if media_type(request) != "multipart/form-data":
        raise BadRequest(
            "expected the content type multipart/form-data (parts file and purpose); received "
            f"{media_type(request)[:80]!a}",
            code="unsupported_media_type",
        )
    async with bounds.uploads.hold(principal.tenant):
        await catalog.calls.read(tenants.check_kept, principal.tenant, principal.quota)
        await run_in_threadpool(disk.check, declared_bytes(request))
        async with received(
            request,
            small=("purpose", _ANCHOR, _SECONDS),
            file="file",
            folder=limits.upload_dir,
            disk=disk,
            limit=limits.max_input_bytes,
        ) as upload:
            kept = _checked(upload, options)
            add = partial(
                _add_once, upload, kept, store.files, repeat=repeat, actor=actor, response=response
            )
            return await catalog.long_calls.write(add)


def _checked(upload: Upload, options: BatchOptions) -> timedelta | None:
    """For how long an upload is kept. Raises BadRequest."""
    for part in ("file", "purpose"):
        if part not in upload.names:
            raise BadRequest(f"the part '{part}' is missing", code="missing_part", param=part)
    purpose = _text(upload, "purpose")
    if purpose != Purpose.BATCH:
        raise BadRequest(
            f"expected the purpose '{Purpose.BATCH}'; received {purpose[:80]!a}", param="purpose"
        )
    if not upload.names & {_ANCHOR, _SECONDS}:
        return options.files_kept
    anchor, seconds = _text(upload, _ANCHOR), _text(upload, _SECONDS)
    if anchor != "created_at":
        raise BadRequest(
            f"expected the anchor 'created_at'; received {anchor[:80]!a}",
            param="expires_after.anchor",
        )
    is_number = seconds.isascii() and seconds.isdigit() and len(seconds) <= len(str(MOST_KEPT_S))
    if not is_number or not LEAST_KEPT_S <= int(seconds) <= MOST_KEPT_S:
        raise BadRequest(
            f"expected a whole number of seconds from {LEAST_KEPT_S} to {MOST_KEPT_S}; received "
            f"{seconds[:80]!a}",
            param="expires_after.seconds",
        )
    return timedelta(seconds=int(seconds))


def _text(upload: Upload, part: str) -> str:
    return upload.parts.get(part, b"").decode("utf-8", "replace")


def _add_once(
    upload: Upload,
    kept: timedelta | None,
    files: FileStore,
    *,
    repeat: Repeatable,
    actor: Actor,
    response: Response,
) -> Any:
    """The body of the response to an upload. Blocking."""
    tenant = repeat.tenant
    # The last part of a path: some clients send whole paths.
    name = re.split(r"[/\\]", _CONTROL.sub("_", upload.filename))[-1][-_FILENAME_CHARACTERS:]

    def change(keep: Keep) -> Replay:
        blob = files.write(upload.file, tenant=tenant)
        with files.change() as connection:
            added = files.add(
                connection,
                blob,
                purpose=Purpose.BATCH,
                filename=name or "file",
                kept=kept,
                creator=actor.key_id,
            )
            check_quota(connection, tenant, {"max_files": 1, "max_file_bytes": added.size_bytes})
            _record(connection, Action.FILE_CREATE, added, actor)
            replay = Replay(200, FileShown.of(added).model_dump(mode="json"))
            keep(connection, replay)
        return replay

    digest = "" if repeat.key is None else _digest(upload, name)
    for attempt in range(_ATTEMPTS):
        try:
            return repeat.once(digest, change, response)
        except BlobCollected:  # it took longer than the grace of a collection
            if attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError


def _digest(upload: Upload, name: str) -> str:
    parts = [_text(upload, part) for part in ("purpose", _ANCHOR, _SECONDS)]
    return request_digest("file", name, *parts, sha256_of(upload.file))


def _record(connection: Any, action: Action, file: FileRecord, actor: Actor) -> None:
    detail = {"filename": file.filename, "bytes": file.size_bytes, "purpose": file.purpose}
    record(connection, action, actor=actor, tenant=file.tenant, subject=file.id, detail=detail)


@router.get("", response_model=FileList)
def list_files(
    *,
    store: StoreDep,
    principal: Generator,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=64)] = None,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> FileList:
    """The tenant's files, newest first."""
    page = store.files.page(
        tenant=principal.tenant,
        purpose=purpose,
        limit=limit + 1,
        after=after,
        oldest_first=order == "asc",
    )
    data = [FileShown.of(file) for file in page[:limit]]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(page) > limit,
    )


@router.get("/{file_id}", response_model=FileShown)
def get_file(file_id: str, store: StoreDep, principal: Generator) -> FileShown:
    """One file."""
    return FileShown.of(store.files.get(file_id, tenant=principal.tenant))


@router.delete("/{file_id}", response_model=FileDeleted)
def delete_file(
    *, file_id: str, store: StoreDep, batches: BatchesDep, principal: Generator, actor: Acting
) -> FileDeleted:
    """Delete a file. The input of a batch that has not ended stays (409)."""
    with store.files.change() as connection:
        deleted = store.files.delete(connection, file_id, tenant=principal.tenant)
        batches.check_unused(connection, file_id)
        _record(connection, Action.FILE_DELETE, deleted, actor)
    return FileDeleted(id=file_id)


class ContentResponse(RangedFile):
    """The bytes of a file of a tenant."""

    def __init__(self, path: FilePath, file: FileRecord, *, status_code: int = 200) -> None:
        super().__init__(
            path,
            size=file.size_bytes,
            modified=int(file.created_at.timestamp()),
            filename=file.filename,
            headers={"etag": f'"{file.digest}"'},
            status_code=status_code,
        )


@router.get("/{file_id}/content", response_class=ContentResponse, responses=file_responses({}))
@takes_long
def get_file_content(
    *,
    request: Request,
    file_id: str,
    store: StoreDep,
    principal: Generator,
    conditions: ConditionsDep,
    range_: Annotated[str | None, Header(alias="Range", description="bytes=0-99")] = None,
    if_range: Annotated[
        str | None, Header(description="Answer Range only if the file has this ETag.")
    ] = None,
) -> Response:
    """The bytes of a file; its ETag is their SHA-256."""
    del range_, if_range  # for the OpenAPI document; RangedFile reads them
    file = store.files.get(file_id, tenant=principal.tenant)
    tag = f'"{file.digest}"'
    if conditions.unchanged(tag):
        return not_modified(tag)
    path = FilePath()
    if not request.state.is_head:
        path = store.fetch(tenant=principal.tenant, digest=file.digest)
    return ContentResponse(path, file)
