"""Errors a caller can meet, and their HTTP status, OpenAI ``type`` and ``code``.

::

    PrefixdError
    ├── BadRequest                400 invalid_request_error
    │   └── DoesNotFit            400 context_length_exceeded
    ├── NotAuthenticated          401 invalid_api_key
    ├── Forbidden                 403 insufficient_scope
    ├── NotFound                  404 not_found
    ├── MethodNotAllowed          405 method_not_allowed
    ├── SlowBody                  408 request_timeout
    ├── Conflict                  409 conflict
    ├── PreconditionFailed        412 precondition_failed
    ├── TooLarge                  413 request_too_large
    ├── RangeNotSatisfiable       416 range_not_satisfiable
    ├── Unprocessable             422 invalid_prefix
    ├── RateLimited               429 rate_limit_exceeded
    │   ├── QuotaExceeded         429 insufficient_quota
    │   └── TooManyTemplates      429 too_many_templates
    ├── HeadTooLarge              431 request_head_too_large
    ├── EngineFailure             500 engine_error
    ├── UnsupportedTransferCoding 501 unsupported_transfer_coding
    ├── Unavailable               503 unavailable
    ├── DeadlineExceeded          504 deadline_exceeded
    └── InsufficientStorage       507 storage_full

``str(error)`` is the message for the caller, with the expected and the received value.
"""

from collections.abc import Mapping
from typing import ClassVar


class PrefixdError(Exception):
    """Base of all errors that are reported to a caller."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        self.headers = headers or {}


class BadRequest(PrefixdError):
    """The request is malformed or asks for something that does not exist here."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class DoesNotFit(BadRequest):
    """Prefix, prompt and max_tokens together can never fit the model or the KV pool."""

    default_code = "context_length_exceeded"


class NotAuthenticated(PrefixdError):
    """No API key, or one that is not known, revoked or expired."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(PrefixdError):
    """The key is good but its scopes do not cover this."""

    status = 403
    type = "permission_error"
    default_code = "insufficient_scope"


class NotFound(PrefixdError):
    """The resource does not exist for this tenant; one of another tenant gives the same error."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(PrefixdError):
    """The route exists, but not for this method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class SlowBody(PrefixdError):
    """The client took too long to send its body."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class Conflict(PrefixdError):
    """The state of the resource does not allow this now."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class PreconditionFailed(PrefixdError):
    """The resource is not in the state that If-Match or If-None-Match requires."""

    status = 412
    type = "invalid_request_error"
    default_code = "precondition_failed"


class TooLarge(PrefixdError):
    """The body exceeds the limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class RangeNotSatisfiable(PrefixdError):
    """The requested range is not in the file."""

    status = 416
    type = "invalid_request_error"
    default_code = "range_not_satisfiable"


class Unprocessable(PrefixdError):
    """An uploaded prefix is rejected."""

    status = 422
    type = "invalid_request_error"
    default_code = "invalid_prefix"


class RateLimited(PrefixdError):
    """The tenant is over one of its own limits."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class QuotaExceeded(RateLimited):
    """The tenant has reached a quota; waiting does not help."""

    type = "insufficient_quota"
    default_code = "insufficient_quota"


class TooManyTemplates(RateLimited):
    """The tenant has as many chat templates that render, or wait, as one may at a time. Nothing was
    rendered."""

    default_code = "too_many_templates"


class HeadTooLarge(PrefixdError):
    """The request line and the headers exceed the limit."""

    status = 431
    type = "invalid_request_error"
    default_code = "request_head_too_large"


class EngineFailure(PrefixdError):
    """The engine failed on this request."""

    status = 500
    type = "server_error"
    default_code = "engine_error"


class UnsupportedTransferCoding(PrefixdError):
    """The body comes in a transfer coding other than chunked."""

    status = 501
    type = "invalid_request_error"
    default_code = "unsupported_transfer_coding"


class Unavailable(PrefixdError):
    """The server is full, starting or draining."""

    status = 503
    type = "server_error"
    default_code = "unavailable"


class DeadlineExceeded(PrefixdError):
    """The request did not end within its own timeout."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


class InsufficientStorage(PrefixdError):
    """The server's disk, or its database's, has no room for this."""

    status = 507
    type = "server_error"
    default_code = "storage_full"
