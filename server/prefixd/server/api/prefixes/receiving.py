"""The bodies of PUT /v1/prefixes/{name}: each content type becomes a publish that can begin.

::

    multipart/form-data         PEFT's two files, metadata and a recipe
    application/json            a text or a composition, metadata and a recipe
    application/octet-stream    the stored file of a version, as its content route returns it
"""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, model_validator

from prefixd.server.api.body import (
    StrictModel,
    check_keys,
    json_request,
    media_type,
    parse_json,
    read_capped,
    spooled,
)
from prefixd.server.api.dependencies import BodyLimits
from prefixd.server.api.generate.compositions import CompositionFields
from prefixd.server.api.generate.shapes import refusal
from prefixd.server.api.multipart import Upload, received
from prefixd.server.api.rendering.renderer import TemplateRenderer
from prefixd.server.api.rendering.tenant_template import check_renders
from prefixd.server.api.served import ServedModel
from prefixd.server.errors import BadRequest, TooLarge, Unprocessable
from prefixd.server.tenants.principal import Principal
from prefixd.store.artifact.envelope import MAX_LINE_BYTES, read_envelope
from prefixd.store.artifact.kinds import Kind, TextRole
from prefixd.store.artifact.recipe import RECIPE, TEMPLATE, folded
from prefixd.store.catalog.changes import Precondition
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.disk import DiskGuard
from prefixd.store.store import PrefixStore, Published

Begin = Callable[[], AbstractContextManager[tuple[CatalogTransaction, Published]]]
"""Starts a publish of the store; the version is committed at the end of its block."""

Content = tuple[str | bytes | Path | Mapping[str, Any] | None, ...]
"""The kind of an upload, and all that distinguishes one of the same kind and name from another."""

Received = tuple[Begin, Content]


class TextPrefix(StrictModel):
    """A hard prompt, as the JSON body of PUT /v1/prefixes/{name}."""

    kind: Literal["text"]
    text: str = Field(min_length=1)
    role: TextRole = Field(
        default=TextRole.RAW,
        description="`raw`: in front of the prompt. `system`: the system turn of each chat. It "
        "belongs to the version.",
    )
    metadata: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = Field(
        default=None, description="How to call it; the same as `recipe` in `metadata`."
    )


class SavedComposition(CompositionFields):
    """A stack, a blend or an ensemble, as the JSON body of PUT /v1/prefixes/{name}."""

    kind: Literal["stack", "blend", "ensemble"] | None = None
    metadata: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = Field(
        default=None, description="How to call it; the same as `recipe` in `metadata`."
    )

    @model_validator(mode="after")
    def _check_kind(self) -> "SavedComposition":
        if self.kind is not None and self.kind != self.composition.kind:
            raise refusal(
                f"expected '{self.composition.kind}', as the body has; received '{self.kind}'",
                at=("kind",),
            )
        return self


UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **json_request(TextPrefix, SavedComposition)["requestBody"]["content"],
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
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
                        "recipe": {
                            "type": "string",
                            "description": "A JSON object: how to call it; the same as `recipe` in "
                            "`metadata`.",
                        },
                    },
                }
            },
        },
    }
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where an upload goes: a name of the caller's tenant, and the base that is served.
    ``precondition`` is on the prefix."""

    name: str
    store: PrefixStore
    served: ServedModel
    templates: TemplateRenderer
    limits: BodyLimits
    disk: DiskGuard
    principal: Principal
    precondition: Precondition

    async def check_template(self, metadata: dict[str, Any] | None) -> None:
        """Raise ArtifactRefused for a chat template that does not render, Unavailable."""
        check = partial(
            check_renders,
            renderer=self.templates,
            served=self.served,
            tenant=self.principal.tenant,
        )
        await run_in_threadpool(check, folded(metadata or {}).get(TEMPLATE))

    def options(self) -> dict[str, Any]:
        """Arguments that every publish of the store takes."""
        base, limit = self.served.base, self.principal.quota.max_virtual_tokens
        if limit is not None:  # the tenant's own limit of virtual tokens, where it is lower
            base = replace(base, max_virtual_tokens=min(limit, base.max_virtual_tokens))
        return {
            "tenant": self.principal.tenant,
            "name": self.name,
            "base": base,
            "creator": self.principal.key_id,
            "precondition": self.precondition,
        }


def receive(request: Request, target: Target) -> AbstractAsyncContextManager[Received]:
    """Receive the body of any content type; its file exists inside the block. Raises BadRequest for
    another content type."""
    kind = media_type(request)
    if kind not in _RECEIVERS:
        raise BadRequest(
            "expected the content type multipart/form-data (parts config, weights and optionally "
            "metadata and recipe), application/json (a text, or a stack, blend or ensemble) or "
            f"application/octet-stream (a stored file); received {kind[:80]!a}",
            code="unsupported_media_type",
        )
    return _RECEIVERS[kind](request, target)


@asynccontextmanager
async def _receive_parts(request: Request, target: Target) -> AsyncIterator[Received]:
    limits = target.limits
    async with received(
        request,
        small=("config", "metadata", "recipe"),
        file="weights",
        folder=limits.upload_dir,
        disk=target.disk,
        limit=limits.max_prefix_bytes,
    ) as upload:
        config, metadata, task_id = _parse_parts(upload)
        await target.check_template(metadata)
        begin = partial(
            target.store.publish_peft,
            config=config,
            weights=upload.file,
            metadata=metadata,
            task_id=task_id,
            **target.options(),
        )
        yield begin, ("peft", config, upload.file, metadata)


@asynccontextmanager
async def _receive_text(request: Request, target: Target) -> AsyncIterator[Received]:
    raw = await read_capped(request, target.limits.max_body_bytes)
    if names_composition(raw):
        async with _receive_composition(raw, target) as received_composition:
            yield received_composition
        return
    body = parse_json(TextPrefix, raw)
    metadata = _with_recipe(body.metadata, body.recipe)
    await target.check_template(metadata)
    begin = partial(
        target.store.publish_text,
        text=body.text,
        role=body.role,
        metadata=metadata,
        count_tokens=target.served.count_prefix_tokens,
        **target.options(),
    )
    yield begin, ("text", body.text.encode(), str(body.role), metadata)


def names_composition(raw: bytes) -> bool:
    """Whether a JSON body has a field of a composition, or its kind. False for a body that is not a
    JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    kinds = [str(kind) for kind in Kind if kind.is_composed]
    return isinstance(body, dict) and (body.get("kind") in kinds or any(k in body for k in kinds))


@asynccontextmanager
async def _receive_composition(raw: bytes, target: Target) -> AsyncIterator[Received]:
    body = parse_json(SavedComposition, raw)
    metadata, composition = _with_recipe(body.metadata, body.recipe), body.composition
    await target.check_template(metadata)
    begin = partial(
        target.store.publish_composition,
        kind=composition.kind,
        members=composition.members,
        combine=composition.combine,
        metadata=metadata,
        count_stack=target.served.count_stack_tokens,
        **target.options(),
    )
    named = body.model_dump(mode="json", exclude={"metadata", "recipe", "kind"})
    yield begin, ("composition", named, metadata)


@asynccontextmanager
async def _receive_artifact(request: Request, target: Target) -> AsyncIterator[Received]:
    limits = target.limits
    limit = limits.max_prefix_bytes + MAX_LINE_BYTES
    async with spooled(request, limit, folder=limits.upload_dir, disk=target.disk) as file:
        envelope = await run_in_threadpool(read_envelope, file)
        if envelope.payload_bytes > limits.max_prefix_bytes:
            raise TooLarge(
                f"expected at most {limits.max_prefix_bytes} bytes after the first line; received "
                f"{envelope.payload_bytes}"
            )
        task_id = envelope.task_id
        begin = partial(
            target.store.publish_stored,
            artifact=file,
            count_stack=target.served.count_stack_tokens,
            metadata=None if task_id is None else {"task_id": task_id},
            count_tokens=target.served.count_prefix_tokens,
            **target.options(),
        )
        yield begin, ("artifact", file)


_RECEIVERS: dict[str, Callable[[Request, Target], AbstractAsyncContextManager[Received]]] = {
    "multipart/form-data": _receive_parts,
    "application/json": _receive_text,
    "application/octet-stream": _receive_artifact,
}


def _parse_parts(upload: Upload) -> tuple[bytes, dict[str, Any] | None, int | None]:
    """Config, metadata and its ``task_id``. Raises BadRequest, Unprocessable."""
    for part in ("config", "weights"):
        if part not in upload.names:
            raise BadRequest(f"the part '{part}' is missing", code="missing_part", param=part)
    config = upload.parts["config"]
    check_keys(config)
    metadata = _with_recipe(_object_in(upload, "metadata"), _object_in(upload, "recipe"))
    if metadata is None:
        return config, None, None
    task_id = metadata.get("task_id")
    if task_id is not None and (type(task_id) is not int or task_id < 0):
        raise Unprocessable(
            "expected metadata.task_id to be a whole number from 0",
            code="malformed_metadata",
            param="metadata.task_id",
        )
    return config, metadata, task_id


def _object_in(upload: Upload, part: str) -> dict[str, Any] | None:
    """The JSON object in a part; None without the part. Raises BadRequest, Unprocessable."""
    raw = upload.parts.get(part)
    if raw is None:
        return None
    check_keys(raw)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unprocessable(
            f"expected the part '{part}' to be a JSON object", code=f"malformed_{part}", param=part
        )
    return value


def _with_recipe(
    metadata: dict[str, Any] | None, recipe: dict[str, Any] | None
) -> dict[str, Any] | None:
    """``metadata`` with a recipe that was sent next to it. Raises Unprocessable for a second."""
    if recipe is None:
        return metadata
    if metadata is not None and RECIPE in metadata:
        raise Unprocessable(
            "expected one recipe; received one in metadata and another next to it",
            code="malformed_recipe",
            param="recipe",
        )
    return {**(metadata or {}), RECIPE: recipe}
