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
from prefixd.server.api.anthropic.requests import CountRequest, MessagesRequest
from prefixd.server.api.anthropic_errors import AnthropicErrorBody
from prefixd.server.api.batches.schemas import BATCH_ID, WINDOW, NewBatchRequest
from prefixd.server.api.body import StrictModel
from prefixd.server.api.conditions import TAGS_PATTERN
from prefixd.server.api.dependencies import API_KEY_HEADER
from prefixd.server.api.error_responses import ErrorBody
from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from prefixd.server.api.prefixes.aliases import AliasTarget
from prefixd.server.api.prefixes.receiving import SavedComposition, TextPrefix
from prefixd.server.api.prefixes.residency import ChosenVersion
from prefixd.server.api.responses.requests import ResponsesRequest
from prefixd.server.api.scoring.requests import (
    DetokenizeRequest,
    LoglikelihoodRequest,
    TokenizeRequest,
)
from prefixd.server.api.users.routes import BindingTarget
from prefixd.server.tenants.idempotency import KEY
from prefixd.server.tenants.keyring import LABEL
from prefixd.store.file_store import FILE_ID
from prefixd.store.names import NAME, REFERENCE

_BODIES: tuple[type[StrictModel], ...] = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
    LoglikelihoodRequest,
    TokenizeRequest,
    DetokenizeRequest,
    SavedComposition,
    TextPrefix,
    AliasTarget,
    ChosenVersion,
    BindingTarget,
    NewBatchRequest,
    NewTenantRequest,
    TenantChange,
    QuotaChange,
    NewKeyRequest,
    Rotation,
)
_REFERENCE = "#/components/schemas/{model}"

_NAME = f"^{NAME}$"
_PARAMETERS = {
    "name": _NAME,
    "alias": _NAME,
    "version": _NAME,
    "tenant": _NAME,
    "reference": REFERENCE,
    "file_id": f"^{FILE_ID}$",
    "batch_id": f"^{BATCH_ID}$",
    "key_id": "^[0-9A-Za-z]{1,128}$",
    "idempotency-key": f"^{KEY}$",
    "if-match": TAGS_PATTERN,
    "if-none-match": TAGS_PATTERN,
}
"""Patterns of text parameters of paths and headers, which the routes check themselves."""

_FIELDS = {
    ("BindingTarget", "prefix"): REFERENCE,
    ("NewBatchRequest", "completion_window"): f"^{WINDOW}$",
    ("NewTenantRequest", "name"): _NAME,
    ("NewKeyRequest", "tenant"): _NAME,
    ("NewKeyRequest", "label"): f"^{LABEL.pattern}$",
}
"""The same of body fields."""


_KEY_HEADER = "APIKeyHeader"


def _header(text: str, *, required: bool = False) -> dict[str, Any]:
    return {"description": text, "required": required, "schema": {"type": "string"}}


_RETRY_AFTER = {"Retry-After": _header("Seconds after which to try again.")}
_ALLOW = {"Allow": _header("The methods of this path.", required=True)}
_CHALLENGE = {"WWW-Authenticate": _header("Bearer", required=True)}
_REQUEST_ID = _header("The id of the request, also in the log.", required=True)


def _errors(*errors: tuple[int, str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"model": ErrorBody, "description": text, "headers": headers}
        for status, text, headers in errors
    }


NO_METHOD = _errors((405, "The path has other methods.", _ALLOW))
"""Declared on every route."""

ERRORS = NO_METHOD | _errors(
    (400, "The request is malformed or can never fit.", {}),
    (401, "No valid API key.", _CHALLENGE),
    (403, "The key's scopes do not cover this.", {}),
    (404, "Not found for this tenant.", {}),
    (408, "The body stalled.", {}),
    (409, "Not allowed in the present state.", {}),
    (412, "The resource is not in the state that If-Match or If-None-Match requires.", {}),
    (413, "The body is too large.", {}),
    (422, "The uploaded prefix is refused.", {}),
    (429, "The tenant is over one of its limits.", _RETRY_AFTER),
    (431, "The request head is too large.", {}),
    (500, "The server failed.", {}),
    (501, "The body has a transfer coding other than chunked.", {}),
    (503, "The server is starting, full or stopping, or its storage is unavailable.", _RETRY_AFTER),
    (504, "The request's own timeout passed.", {}),
    (507, "The server's storage is full.", _RETRY_AFTER),
)
"""Declared on every route with a key."""

ANTHROPIC_ERRORS = {
    status: {**response, "model": AnthropicErrorBody} for status, response in ERRORS.items()
}
"""The same, on the routes of the Messages API."""


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
        for name, defined in [*schema.pop("$defs", {}).items(), (model.__name__, schema)]:
            assert schemas.setdefault(name, defined) == defined, f"two models are named {name}"
    for (model_name, field), pattern in _FIELDS.items():
        _add_pattern(schemas[model_name]["properties"][field], pattern)
    document["components"]["securitySchemes"][_KEY_HEADER] = {
        "type": "apiKey",
        "in": "header",
        "name": API_KEY_HEADER,
        "description": "An API key, where Anthropic's clients send theirs.",
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            _complete(operation)
    return document


def _complete(operation: dict[str, Any]) -> None:
    """Add the patterns of an operation's parameters, the headers of all its responses, and the
    second place of a key."""
    if "security" in operation:
        operation["security"].append({_KEY_HEADER: []})
    for parameter in operation.get("parameters", ()):
        _drop_null(parameter["schema"])
        pattern = _PARAMETERS.get(parameter["name"].lower())
        if pattern is not None and parameter["in"] != "query":
            _add_pattern(parameter["schema"], pattern)
        _name_bounds(parameter["schema"])
    for response in operation["responses"].values():
        response.setdefault("headers", {})["x-request-id"] = _REQUEST_ID


def _name_bounds(schema: dict[str, Any]) -> None:
    """Bounds of a type with a validator before it keep pydantic's names."""
    for ours, theirs in (("ge", "minimum"), ("le", "maximum")):
        if ours in schema:
            schema[theirs] = schema.pop(ours)


def _drop_null(schema: dict[str, Any]) -> None:
    """A parameter is left out, never null."""
    kinds = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])


def _add_pattern(schema: dict[str, Any], pattern: str) -> None:
    for one in (schema, *schema.get("anyOf", ())):
        if one.get("type") == "string":
            one.setdefault("pattern", pattern)
