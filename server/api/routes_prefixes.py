"""/v1/prefixes: upload, look, name and delete."""

import json
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from prefix_store.store import Manifest, Published
from server.api.auth import Reader, Writer
from server.api.body import (
    StrictModel,
    json_body,
    json_request,
    media_type,
    parse_json,
    read_capped,
)
from server.api.multipart import received
from server.api.services import Services, ServicesDep
from server.errors import BadRequest, Unprocessable

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])

Version = Annotated[int, Path(ge=1, le=2**31 - 1)]


class TextPrefix(StrictModel):
    """A hard prompt, as the JSON body of PUT /v1/prefixes/{name}."""

    kind: Literal["text"]
    text: str = Field(min_length=1)
    metadata: dict[str, Any] | None = None


class AliasTarget(StrictModel):
    """Which version an alias shall mean."""

    version: int = Field(ge=1, le=2**31 - 1)


class PrefixManifest(BaseModel):
    """One immutable version of a prefix; only ``aliases`` may change."""

    object: Literal["prefix"] = "prefix"
    name: str
    version: int
    digest: str
    kind: str
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    size_bytes: int
    fingerprint: str
    created_at: datetime
    base_model_name_or_path: str | None
    metadata: dict[str, Any]
    aliases: list[str]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """``manifest`` as it is shown."""
        return cls(
            name=manifest.name,
            version=manifest.version,
            digest=manifest.digest,
            kind=manifest.kind.value,
            peft_type=manifest.peft_type,
            num_virtual_tokens=manifest.num_virtual_tokens,
            dtype=manifest.dtype,
            size_bytes=manifest.size_bytes,
            fingerprint=manifest.fingerprint,
            created_at=manifest.created_at,
            base_model_name_or_path=manifest.base_model_name_or_path,
            metadata=dict(manifest.metadata),
            aliases=list(manifest.aliases),
        )


class PrefixList(BaseModel):
    """Some prefixes by name; ``next_after`` is what ``after`` takes for more, null at the end."""

    object: Literal["list"] = "list"
    data: list[PrefixManifest]
    next_after: str | None = None


_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            **json_request(TextPrefix)["requestBody"]["content"],
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["config", "weights"],
                    "additionalProperties": False,
                    "properties": {
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "PEFT's adapter_config.json",
                        },
                        "weights": {
                            "type": "string",
                            "format": "binary",
                            "description": "PEFT's adapter_model.safetensors",
                        },
                        "metadata": {
                            "type": "string",
                            "description": "A JSON object; `task_id` chooses the task of a "
                            "MULTITASK_PROMPT_TUNING prefix.",
                        },
                    },
                }
            },
        },
    }
}


@router.put(
    "/{name}",
    response_model=PrefixManifest,
    responses={
        200: {"description": "The same bytes were there already, as this version."},
        201: {"description": "A new version.", "model": PrefixManifest},
    },
    openapi_extra=_UPLOAD,
)
async def put_prefix(
    request: Request, response: Response, name: str, services: ServicesDep, principal: Writer
) -> PrefixManifest:
    """Upload a prefix: PEFT's two files as multipart, or a text as JSON. Durable on return."""
    kind = media_type(request)
    if kind == "multipart/form-data":
        published = await _put_peft(request, services, principal.tenant, name)
    elif kind == "application/json":
        body = parse_json(TextPrefix, await read_capped(request, services.limits.max_body_bytes))
        published = await run_in_threadpool(
            services.store.publish_text,
            tenant=principal.tenant,
            name=name,
            text=body.text,
            metadata=body.metadata,
            base=services.served.base,
            count_tokens=services.served.count_prefix_tokens,
        )
    else:
        raise BadRequest(
            "expected the content type multipart/form-data (parts config, weights and optionally "
            f"metadata) or application/json (a text); received {kind[:80]!a}",
            code="unsupported_media_type",
        )
    response.status_code = 201 if published.created else 200
    return PrefixManifest.of(published.manifest)


async def _put_peft(request: Request, services: Services, tenant: str, name: str) -> Published:
    async with received(
        request,
        small=("config", "metadata"),
        file="weights",
        folder=services.limits.upload_dir,
        limit=services.limits.max_prefix_bytes,
    ) as upload:
        for part in ("config", "weights"):
            if part not in upload.names:
                raise BadRequest(f"the part '{part}' is missing", code="missing_part", param=part)
        metadata = _metadata(upload.parts.get("metadata"))
        return await run_in_threadpool(
            services.store.publish_peft,
            tenant=tenant,
            name=name,
            config=upload.parts["config"],
            weights=upload.file,
            metadata=metadata,
            base=services.served.base,
            task_id=_task_id(metadata),
        )


def _metadata(raw: bytes | None) -> dict[str, Any] | None:
    if raw is None:
        return None
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unprocessable(
            "expected the part 'metadata' to be a JSON object",
            code="malformed_metadata",
            param="metadata",
        )
    return found


def _task_id(metadata: dict[str, Any] | None) -> int | None:
    task_id = (metadata or {}).get("task_id")
    if task_id is not None and (type(task_id) is not int or task_id < 0):
        raise Unprocessable(
            "expected metadata.task_id to be a whole number from 0",
            code="malformed_metadata",
            param="metadata.task_id",
        )
    return task_id


@router.get("", response_model=PrefixList)
def list_prefixes(
    services: ServicesDep,
    principal: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> PrefixList:
    """The caller's prefixes by name, each at its latest version."""
    page = services.store.list(tenant=principal.tenant, limit=limit, after=after)
    return PrefixList(
        data=[PrefixManifest.of(one) for one in page.manifests], next_after=page.next_after
    )


@router.get("/{reference}", response_model=PrefixManifest)
def get_prefix(reference: str, services: ServicesDep, principal: Reader) -> PrefixManifest:
    """The version that `name`, `name@3` or `name@alias` means now."""
    return PrefixManifest.of(services.store.resolve(tenant=principal.tenant, reference=reference))


@router.delete("/{name}", status_code=204)
def delete_prefix(name: str, services: ServicesDep, principal: Writer) -> None:
    """Forget a prefix with all its versions and aliases. Requests that run keep what they have."""
    services.store.delete(tenant=principal.tenant, name=name)


@router.get("/{name}/versions", response_model=PrefixList)
def list_versions(name: str, services: ServicesDep, principal: Reader) -> PrefixList:
    """All versions, newest first."""
    found = services.store.versions(tenant=principal.tenant, name=name)
    return PrefixList(data=[PrefixManifest.of(one) for one in found])


@router.get(
    "/{name}/versions/{version}/content",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def get_content(
    name: str, version: Version, services: ServicesDep, principal: Reader
) -> FileResponse:
    """The stored artifact, byte for byte; its SHA-256 is the digest."""
    manifest = services.store.manifest(tenant=principal.tenant, name=name, version=version)
    path = services.store.fetch(tenant=principal.tenant, digest=manifest.digest)
    return FileResponse(
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
    name: str,
    alias: str,
    services: ServicesDep,
    principal: Writer,
    body: Annotated[AliasTarget, Depends(json_body(AliasTarget))],
) -> PrefixManifest:
    """Let `name@alias` mean a version from the next request on."""
    manifest = await run_in_threadpool(
        services.store.set_alias,
        tenant=principal.tenant,
        name=name,
        alias=alias,
        version=body.version,
    )
    return PrefixManifest.of(manifest)


@router.delete("/{name}/aliases/{alias}", status_code=204)
def delete_alias(name: str, alias: str, services: ServicesDep, principal: Writer) -> None:
    """Forget an alias; the version stays."""
    services.store.remove_alias(tenant=principal.tenant, name=name, alias=alias)
