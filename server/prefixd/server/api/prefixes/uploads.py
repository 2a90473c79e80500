"""PUT /v1/prefixes/{name}: a new version, from PEFT's files or a text."""

from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from prefixd.server.api.auth import Acting, Writer
from prefixd.server.api.body import StrictModel, json_request, media_type, parse_json, read_capped
from prefixd.server.api.parts import (
    AuditDep,
    BodyLimits,
    BodyLimitsDep,
    DrainStateDep,
    EngineDep,
    IdempotencyDep,
    LimiterDep,
    ServedDep,
    StoreDep,
)
from prefixd.server.api.prefixes.manifests import PrefixManifest
from prefixd.server.api.prefixes.multipart import Upload, received
from prefixd.server.api.prefixes.publishing import Publishing, parse_metadata, task_id_of
from prefixd.server.api.prefixes.residency import try_warm
from prefixd.server.errors import BadRequest

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])


class TextPrefix(StrictModel):
    """A hard prompt, as the JSON body of PUT /v1/prefixes/{name}."""

    kind: Literal["text"]
    text: str = Field(min_length=1)
    metadata: dict[str, Any] | None = None


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

Warm = Annotated[
    bool,
    Query(description="Bring it into this server's KV pool at once; the upload never fails by it."),
]
IdempotencyKey = Annotated[
    str | None,
    Header(description="The same key with the same upload gets the same answer, for a day."),
]


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
    *,
    request: Request,
    response: Response,
    name: str,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    audit: AuditDep,
    idempotency: IdempotencyDep,
    limiter: LimiterDep,
    limits: BodyLimitsDep,
    drain_state: DrainStateDep,
    principal: Writer,
    actor: Acting,
    warm: Warm = False,
    idempotency_key: IdempotencyKey = None,
) -> PrefixManifest:
    """Upload a prefix: PEFT's two files as multipart, or a text as JSON. Durable on return."""
    left = await run_in_threadpool(limiter.count, principal.tenant, principal.quota)
    response.headers.update(left)
    publishing = Publishing(
        store=store,
        audit=audit,
        idempotency=idempotency,
        served=served,
        principal=principal,
        actor=actor,
        name=name,
        key=idempotency_key,
    )
    kind = media_type(request)
    if kind == "multipart/form-data":
        async with _peft(request, limits) as upload:
            for part in ("config", "weights"):
                if part not in upload.names:
                    raise BadRequest(
                        f"the part '{part}' is missing", code="missing_part", param=part
                    )
            metadata = parse_metadata(upload.parts.get("metadata"))
            done = await run_in_threadpool(
                publishing.peft,
                upload.parts["config"],
                upload.file,
                metadata=metadata,
                task_id=task_id_of(metadata),
            )
    elif kind == "application/json":
        body = parse_json(TextPrefix, await read_capped(request, limits.max_body_bytes))
        done = await run_in_threadpool(publishing.text, body.text, metadata=body.metadata)
    else:
        raise BadRequest(
            "expected the content type multipart/form-data (parts config, weights and optionally "
            f"metadata) or application/json (a text); received {kind[:80]!a}",
            code="unsupported_media_type",
        )
    response.status_code = done.status
    if done.replayed:
        response.headers["idempotency-replayed"] = "true"
    manifest = PrefixManifest.model_validate(done.body)
    if warm:
        reference = f"{manifest.name}@{manifest.version}"
        await run_in_threadpool(
            try_warm,
            reference,
            principal,
            store=store,
            engine=engine,
            served=served,
            drain_state=drain_state,
        )
    return manifest


def _peft(request: Request, limits: BodyLimits) -> AbstractAsyncContextManager[Upload]:
    return received(
        request,
        small=("config", "metadata"),
        file="weights",
        folder=limits.upload_dir,
        limit=limits.max_prefix_bytes,
    )
