"""Errors in the shape of Anthropic: {"type": "error", "error": {"type", "message"}, "request_id"}.

All routes of the Messages API have it, also where no route is reached.
"""

from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel

from prefixd.server.errors import PrefixdError
from prefixd.server.tenants.key_text import redacted

PATH = "/v1/messages"

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_TIMEOUT: "timeout_error",
    HTTPStatus.CONFLICT: "conflict_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.INTERNAL_SERVER_ERROR: "api_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
    HTTPStatus.INSUFFICIENT_STORAGE: "api_error",
}
"""By status; all others are those of a wrong request."""


class ErrorDetails(BaseModel):
    """The code and the place that errors of other routes have."""

    error_code: str
    param: str | None


class AnthropicError(BaseModel):
    """What went wrong: a sentence, and what kind of error it is."""

    type: str
    message: str
    details: ErrorDetails


class AnthropicErrorBody(BaseModel):
    """The body of every error of the Messages API."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str | None


def is_of_anthropic(path: str) -> bool:
    """Whether a path belongs to the Messages API."""
    return path.startswith(PATH) and path[len(PATH) :][:1] in {"", "/"}


def anthropic_error(error: PrefixdError, request_id: str | None) -> dict[str, Any]:
    """The JSON body for ``error``. A key that was sent in the wrong place is not repeated."""
    detail = AnthropicError(
        type=_TYPES.get(HTTPStatus(error.status), "invalid_request_error"),
        message=redacted(error.message),
        details=ErrorDetails(
            error_code=error.code, param=None if error.param is None else redacted(error.param)
        ),
    )
    return AnthropicErrorBody(type="error", error=detail, request_id=request_id).model_dump()
