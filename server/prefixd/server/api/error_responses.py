"""Every error in one shape: {"error": {"message", "type", "code", "param", "request_id"}}; those of
the Messages API in Anthropic's.

``prefixd.server.errors`` has the status, type and code of each class; here everything else that can
go wrong becomes one of these classes: exceptions of the store, the database, pydantic and the
router, a full queue, and sequences that the engine ended early.
"""

import math
import sqlite3
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from prefixd.server.api.anthropic_errors import anthropic_error, is_of_anthropic
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.validation_words import from_validation
from prefixd.server.engine.constraint import CONSTRAINT_FAILED
from prefixd.server.engine.prefix_source import (
    CORRUPT_PREFIX,
    PREFIX_NOT_FOUND,
    PREFIX_REFUSED,
    STORAGE_FULL,
    STORAGE_UNAVAILABLE,
)
from prefixd.server.engine.request import FinishEvent, FinishReason, QueueFull
from prefixd.server.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    EngineFailure,
    InsufficientStorage,
    NotFound,
    PrefixdError,
    Unavailable,
    Unprocessable,
)
from prefixd.server.tenants.key_text import redacted
from prefixd.store.disk import DiskGuard
from prefixd.store.errors import (
    ArtifactRefused,
    BaseMismatch,
    BlobsUnavailable,
    CorruptArtifact,
    InvalidReference,
    MemberDeleted,
    StorageFull,
    StoreError,
    UnknownFile,
    UnknownPrefix,
    VersionInUse,
)
from prefixd.store.faults import StorageFault, storage_fault

log = structlog.get_logger("prefixd")

CATALOG_UNAVAILABLE = "the catalog cannot be reached; try again later"
DISK_FULL = "the server's storage is full: delete what is not needed, or try again later"
DISK_FAILED = "the server's storage cannot be used now; try again later"
_OVERLOADED = "overloaded"
_STORAGE_RETRY_S = 5.0
_SHED_RETRY_S = 1.0

_REPORTED: dict[type[StoreError], tuple[type[PrefixdError], str]] = {
    InvalidReference: (BadRequest, "invalid_reference"),
    UnknownPrefix: (NotFound, "prefix_not_found"),
    UnknownFile: (NotFound, "file_not_found"),
    BaseMismatch: (Conflict, "base_mismatch"),
    VersionInUse: (Conflict, "version_in_use"),
    MemberDeleted: (Conflict, "member_deleted"),
    CorruptArtifact: (EngineFailure, "corrupt_prefix"),
}
"""Errors of the store that keep their message."""


class ErrorDetail(BaseModel):
    """What went wrong: a sentence, and codes for programs."""

    message: str
    type: str
    code: str
    param: str | None
    request_id: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_body(error: PrefixdError, request_id: str | None, *, path: str = "") -> dict[str, Any]:
    """The JSON body for ``error`` in answer to a request for ``path``. A key that was sent in the
    wrong place is not repeated."""
    if is_of_anthropic(path):
        return anthropic_error(error, request_id)
    detail = ErrorDetail(
        message=redacted(error.message),
        type=error.type,
        code=error.code,
        param=None if error.param is None else redacted(error.param),
        request_id=request_id,
    )
    return ErrorBody(error=detail).model_dump()


def error_response(
    error: PrefixdError,
    request_id: str | None,
    headers: Mapping[str, str] | None = None,
    *,
    path: str = "",
) -> JSONResponse:
    """``error`` as a response to a request for ``path``."""
    sent = {**(headers or {}), **error.headers}
    if error.retry_after is not None:
        # Rounded up: a client that waits this long is not refused again.
        sent["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        sent["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error, request_id, path=path), error.status, headers=sent)


def internal_error() -> PrefixdError:
    """The error for an unexpected exception: its details are for the log only."""
    return PrefixdError("the server failed on this request; the log says why")


def storage_unavailable(message: str) -> Unavailable:
    """The error for a database or a bucket that cannot be reached."""
    return Unavailable(message, code="storage_unavailable", retry_after=_STORAGE_RETRY_S)


def from_fault(fault: StorageFault) -> PrefixdError:
    """The error for a failure of the disk, or of the database's."""
    if fault is StorageFault.FULL:
        return InsufficientStorage(DISK_FULL)
    return storage_unavailable(DISK_FAILED)


def from_store(error: StoreError) -> PrefixdError:
    """The error for an exception of the store."""
    match error:
        case ArtifactRefused():
            return Unprocessable(error.message, code=error.code, param=error.param)
        case BlobsUnavailable():
            return storage_unavailable(error.message)
        case StorageFull():
            return InsufficientStorage(error.message)
        case _ if type(error) in _REPORTED:
            reported, code = _REPORTED[type(error)]
            return reported(error.message, code=code)
        case _:
            return EngineFailure("the prefix store failed", code="store_error")


def from_finish(event: FinishEvent, drain_state: DrainState) -> PrefixdError:
    """The error for a sequence that has no complete output."""
    match event.reason:
        case FinishReason.ERROR:
            message = event.error or "the engine failed on this request"
            if event.error_code == CONSTRAINT_FAILED:
                return BadRequest(message, code=CONSTRAINT_FAILED)
            return from_unavailable(message, event.error_code)
        case FinishReason.TIMEOUT:
            return DeadlineExceeded(event.error or "the request's timeout has passed")
        case FinishReason.SHED:
            return Unavailable(
                event.error or "the server is too busy to begin this request",
                code=_OVERLOADED,
                retry_after=event.retry_after or _SHED_RETRY_S,
            )
        case FinishReason.ABORT:
            return drain_state.refusal("the server stopped before the answer was complete")
        case FinishReason.STOP | FinishReason.LENGTH:
            raise AssertionError(f"a complete sequence has no error: {event}")


def from_unavailable(message: str, code: str | None) -> PrefixdError:
    """The error for a prefix that failed to load, by its code, or for a failure of the engine."""
    match code:
        case _ if code == STORAGE_UNAVAILABLE:
            return storage_unavailable(message)
        case _ if code == STORAGE_FULL:
            return InsufficientStorage(message)
        case _ if code == PREFIX_NOT_FOUND:
            return NotFound(message, code=code)
        case _ if code == CORRUPT_PREFIX:
            return EngineFailure(message, code=code, param="model")
        case _ if code == PREFIX_REFUSED:
            return Unprocessable(message, code=code, param="model")
        case _:
            return EngineFailure(message)


def from_queue_full(full: QueueFull, drain_state: DrainState) -> PrefixdError:
    """The error for a request that the engine did not accept."""
    if drain_state.closed:
        return drain_state.refusal()
    return Unavailable(full.message, code=_OVERLOADED, retry_after=full.retry_after)


def request_id_of(request: Request) -> str | None:
    """The id the middleware gave this request."""
    return getattr(request.state, "request_id", None)


def _response(request: Request, error: PrefixdError) -> JSONResponse:
    return error_response(error, request_id_of(request), path=request.scope["path"])


def install(app: FastAPI) -> None:
    """Register handlers, so that ``app`` responds to every error in the shape of its route."""

    @app.exception_handler(PrefixdError)
    async def on_error(request: Request, error: PrefixdError) -> JSONResponse:
        return _response(request, error)

    @app.exception_handler(StoreError)
    async def on_store(request: Request, error: StoreError) -> JSONResponse:
        return _response(request, from_store(error))

    @app.exception_handler(OSError)
    @app.exception_handler(DBAPIError)
    async def on_storage(request: Request, error: OSError | DBAPIError) -> JSONResponse:
        disk: DiskGuard = request.app.state.disk
        fault = await run_in_threadpool(disk.fault_of, error)
        if fault is None:
            raise error
        log.error("the storage failed", fault=fault.value, why=str(error).partition("\n")[0])
        return _response(request, from_fault(fault))

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeout)
    async def on_database(request: Request, error: SQLAlchemyError) -> JSONResponse:
        if _is_bad_query(error):
            raise error
        if isinstance(error, DBAPIError) and storage_fault(error) is not None:
            return await on_storage(request, error)
        # The reason, which may name the database's address, is for the log.
        log.error("the catalog failed", why=str(error).partition("\n")[0])
        return _response(request, storage_unavailable(CATALOG_UNAVAILABLE))

    @app.exception_handler(DataError)
    async def on_value(request: Request, error: DataError) -> JSONResponse:
        if "NUL" not in str(error.orig):
            raise error
        # PostgreSQL rejects such a text in a query, SQLite finds nothing.
        bad_text = BadRequest("expected texts without NUL characters; received one with some")
        return _response(request, bad_text)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _response(request, from_validation(error.errors()))


def _is_bad_query(error: SQLAlchemyError) -> bool:
    """Whether the query is wrong and not the database unavailable: SQLite has one class for a bad
    query and for a file that is locked or missing."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    name = getattr(cause, "sqlite_errorname", None)  # absent where Python itself raised
    return isinstance(cause, sqlite3.Error) and name == "SQLITE_ERROR"
