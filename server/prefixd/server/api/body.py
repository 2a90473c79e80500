"""Request bodies: read after authentication, limited, and parsed once into a strict type.

FastAPI would read the whole body before it runs the authentication dependency, and would coerce
wrong types. Here the body is a dependency of its own, which needs the principal.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, ValidationError

from prefixd.server.api.dependencies import BodyLimits, bounds_of, hold_call, principal_of
from prefixd.server.api.validation_words import from_validation
from prefixd.server.errors import BadRequest, TooLarge
from prefixd.store.disk import DiskGuard
from prefixd.store.files import UPLOAD_PREFIX, file_in_progress

FLUSH_BYTES = 1024 * 1024
"""A body is written to its file in pieces of about this size."""


class StrictModel(BaseModel):
    """A request body: no coercion, no unknown field, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


Model = TypeVar("Model", bound=StrictModel)


async def capped(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in chunks. Raises TooLarge past ``limit`` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, received=f"{declared} bytes")
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise _too_large(limit, received="more")
        yield chunk


async def read_capped(request: Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge past ``limit`` bytes."""
    body = bytearray()
    async for chunk in capped(request, limit):
        body += chunk
    return bytes(body)


class Spool:
    """A file under ``folder``, which must exist, for a body that is being received; removed at the
    end of the block. Raises StorageFull when the disk has too little room."""

    def __init__(self, folder: Path, disk: DiskGuard) -> None:
        self._disk = disk
        self._in_progress = file_in_progress(folder, prefix=UPLOAD_PREFIX)

    async def __aenter__(self) -> Self:
        await run_in_threadpool(self._open)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._in_progress.__exit__(None, None, None)

    async def take(self, pending: bytearray, *, at_least: int = 0) -> None:
        """Write ``pending`` and empty it, when it has ``at_least`` bytes."""
        if len(pending) >= at_least:
            await run_in_threadpool(self._write, pending)
            pending.clear()

    def _open(self) -> None:
        self.path, self._file = self._in_progress.__enter__()

    def _write(self, data: bytearray) -> None:
        # Checked at each write: several uploads may have begun while there was room for one.
        self._disk.check(len(data))
        self._file.write(data)
        self._file.flush()


@asynccontextmanager
async def spooled(
    request: Request, limit: int, *, folder: Path, disk: DiskGuard
) -> AsyncIterator[Path]:
    """The body in a file under ``folder``, which must exist; removed at the end of the block.
    Raises TooLarge past ``limit`` bytes, StorageFull."""
    async with Spool(folder, disk) as spool:
        pending = bytearray()
        async for chunk in capped(request, limit):
            pending += chunk
            await spool.take(pending, at_least=FLUSH_BYTES)
        await spool.take(pending)
        yield spool.path


def declared_bytes(request: Request) -> int:
    """The length of the body as its head declares it; 0 without one."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdigit() else 0


def check_keys(body: bytes) -> None:
    """Raise BadRequest for JSON in which an object has a key twice, or that is nested too deep. Of
    other faults nothing is said: the parser that follows refuses them.

    pydantic keeps the last of two values. This pass costs a third of pydantic's for a small body,
    and about as much as pydantic's for the largest.
    """
    try:
        json.loads(body, object_pairs_hook=_check_object)
    except RecursionError:
        raise BadRequest("expected less deeply nested JSON", code="invalid_json") from None
    except ValueError:
        return


def _check_object(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(
            f"expected each key of a JSON object once; received {twice[:80]!a} several times",
            code="invalid_json",
        )


def parse_json(model: type[Model], body: bytes) -> Model:
    """``body`` as a strict ``model``. Raises BadRequest with one sentence."""
    check_keys(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from None


def json_body(model: type[Model], *, optional: bool = False) -> Callable[..., Awaitable[Model]]:
    """A dependency on the body as ``model``, of authenticated callers only. ``optional``: an empty
    body means an empty object."""

    async def read(request: Request) -> Model:
        limits: BodyLimits = request.app.state.body_limits
        bounds, principal = bounds_of(request), principal_of(request)
        # A body of unknown length may be as long as any.
        size = declared_bytes(request) or limits.max_body_bytes
        async with bounds.bodies.hold(principal.tenant, min(size, limits.max_body_bytes)):
            body = await read_capped(request, limits.max_body_bytes)
            parsed = model() if optional and not body else _parse(model, request, body)
        await hold_call(request, bounds.changes, principal)
        return parsed

    return read


def _parse(model: type[Model], request: Request, body: bytes) -> Model:
    received = media_type(request)
    if received != "application/json" and not received.endswith("+json"):
        raise BadRequest(
            f"expected the content type application/json; received {received[:80]!a}",
            code="unsupported_media_type",
        )
    return parse_json(model, body)


def media_type(request: Request) -> str:
    """The content type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_request(*models: type[StrictModel], required: bool = True) -> dict[str, Any]:
    """The OpenAPI entry of a body that FastAPI does not read itself.

    ``prefixd.server.api.openapi`` adds the models' schemas that it refers to.
    """
    references = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": required, "content": content}}


def _too_large(limit: int, *, received: str) -> TooLarge:
    return TooLarge(f"expected a body of at most {limit} bytes; received {received}")
