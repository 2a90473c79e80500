"""The errors that the client raises.

::

    ClientError
    ├── TransportError            no response
    │   ├── ConnectError          the server does not listen
    │   └── TimedOutError         no response in time
    ├── ProtocolError             a response that a prefixd server does not send
    ├── FormatError               a file or a text that is not in the expected format
    ├── DownloadError             a repository of the Hub that cannot be read
    ├── StreamInterruptedError    the stream ended before its last event
    └── ApiError                  an error response: status, code, request_id
        ├── BadRequestError       400
        ├── AuthenticationError   401
        ├── PermissionDeniedError 403
        ├── NotFoundError         404
        ├── ConflictError         409
        ├── PreconditionFailedError 412
        ├── TooLargeError         413
        ├── InvalidPrefixError    422
        ├── RateLimitError        429
        └── ServerError           5xx
            ├── UnavailableError  503
            ├── DeadlineError     504
            └── StorageFullError  507
"""


class ClientError(Exception):
    """Base of all errors of this client."""


class TransportError(ClientError):
    """The connection failed before the response was complete."""


class ConnectError(TransportError):
    """No connection could be made, so the server has not seen the request."""


class TimedOutError(TransportError):
    """The server did not respond within the client's timeout."""


class ProtocolError(ClientError):
    """The response is not one of a prefixd server: wrong URL, or a proxy in between."""


class FormatError(ClientError):
    """A local file or a text is not in the expected format; nothing was sent."""


class DownloadError(ClientError):
    """A repository of the Hugging Face Hub cannot be read; nothing was sent to the server."""


class StreamInterruptedError(ClientError):
    """The stream ended without its closing event: the text may be incomplete."""


class ApiError(ClientError):
    """The server refused the request or failed, and sent an error message.

    ``request_id`` finds the request in the server's log. ``retry_after`` is in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the field's name in the OpenAI error object
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequestError(ApiError):
    """The request is malformed, or can never fit the model."""


class AuthenticationError(ApiError):
    """No API key, or one the server does not know."""


class PermissionDeniedError(ApiError):
    """The key is valid, but its scopes do not allow this."""


class NotFoundError(ApiError):
    """This tenant has no such resource."""


class ConflictError(ApiError):
    """The state of the resource does not allow this now."""


class PreconditionFailedError(ApiError):
    """The resource is not in the state that ``if_match`` or ``if_none_match`` requires."""


class TooLargeError(ApiError):
    """The body exceeds the server's limit."""


class InvalidPrefixError(ApiError):
    """The upload was refused; the message gives the expected and the received value."""


class RateLimitError(ApiError):
    """The tenant is over one of its limits."""


class ServerError(ApiError):
    """The server failed on this request."""


class UnavailableError(ServerError):
    """The server is full, starting or draining."""


class DeadlineError(ServerError):
    """The request did not end within its own ``timeout``, or the server's maximum."""


class StorageFullError(ServerError):
    """The server's disk, or its database's, is full; deleting prefixes makes room."""


BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    412: PreconditionFailedError,
    413: TooLargeError,
    422: InvalidPrefixError,
    429: RateLimitError,
    503: UnavailableError,
    504: DeadlineError,
    507: StorageFullError,
}


BY_CODE = {
    "shutting_down": 503,
    "overloaded": 503,
    "unavailable": 503,
    "storage_unavailable": 503,
    "storage_full": 507,
    "deadline_exceeded": 504,
}
"""The status of a failure during a stream, by its code: the status line was sent as 200."""


def error_class(status: int) -> type[ApiError]:
    """The class for an HTTP status."""
    return BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
