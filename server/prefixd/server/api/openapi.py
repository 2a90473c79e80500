"""The OpenAPI document: FastAPI's, plus the bodies that ``body.py`` reads, plus errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from prefixd.server.api.admin.schemas import (
    NewKeyRequest,
    NewTenantRequest,
    QuotaChange,
    Rotation,
    TenantChange,
)
from prefixd.server.api.body import StrictModel
from prefixd.server.api.error_responses import ErrorBody
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.prefixes.aliases import AliasTarget
from prefixd.server.api.prefixes.receiving import TextPrefix
from prefixd.server.api.prefixes.residency import ChosenVersion
from prefixd.server.api.users.routes import BindingTarget

_BODIES: tuple[type[StrictModel], ...] = (
    CompletionRequest,
    ChatRequest,
    TextPrefix,
    AliasTarget,
    ChosenVersion,
    BindingTarget,
    NewTenantRequest,
    TenantChange,
    QuotaChange,
    NewKeyRequest,
    Rotation,
)
_REFERENCE = "#/components/schemas/{model}"

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "The request is malformed or can never fit."),
        (401, "No valid API key."),
        (403, "The key's scopes do not cover this."),
        (404, "Not found for this tenant."),
        (408, "The body stalled."),
        (409, "Not allowed in the present state."),
        (412, "The resource is not in the state that If-Match or If-None-Match requires."),
        (413, "The body is too large."),
        (416, "The file has no such part."),
        (422, "The uploaded prefix is refused."),
        (429, "The tenant is over one of its limits."),
        (500, "The server failed."),
        (503, "The server is starting, full or stopping."),
        (504, "The request's own timeout passed."),
        (507, "The server's storage is full."),
    )
}
"""Declared on every route with a key."""


def install(app: FastAPI) -> None:
    """Make ``app.openapi`` return the complete document."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in _BODIES:
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    return document
