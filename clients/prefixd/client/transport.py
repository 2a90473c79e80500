"""What both clients share around httpx2: requests, responses, errors and the retry policy."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import httpx2

from prefixd.client.errors import (
    ApiError,
    ClientError,
    ConnectError,
    ProtocolError,
    RateLimitError,
    TimedOutError,
    TransportError,
    UnavailableError,
)
from prefixd.client.wire import Request, Response, dump

DEFAULT_URL = "http://127.0.0.1:8000"
# In seconds. Without streaming, a read lasts as long as the generation.
DEFAULT_TIMEOUT = 300.0
CONNECT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries only what the server has not begun: no connection, 429 and 503.

    ``attempts`` counts the first try. Waits double from ``first_wait`` seconds; the server's
    ``Retry-After`` replaces them. If a wait would exceed ``max_wait``, the error is raised instead.
    """

    attempts: int = 4
    first_wait: float = 0.25
    max_wait: float = 10.0

    def wait(self, error: ClientError, *, attempt: int, jitter: float) -> float | None:
        """Seconds to wait after try number ``attempt`` (from 1) failed; None to give up.

        ``jitter`` in [0, 1) spreads clients that failed together over the upper half of the wait.
        """
        if attempt >= self.attempts:
            return None
        if not isinstance(error, ConnectError | RateLimitError | UnavailableError):
            return None
        wait = self.first_wait * 2 ** (attempt - 1) * (0.5 + jitter / 2)
        if isinstance(error, ApiError) and error.retry_after is not None:
            wait = error.retry_after
        return wait if wait <= self.max_wait else None


class HttpOptions(TypedDict):
    """Keyword arguments that both httpx2 clients take."""

    base_url: str
    headers: dict[str, str]
    timeout: httpx2.Timeout


def http_options(url: str, *, api_key: str | None, timeout: float) -> HttpOptions:
    """Options for an httpx2 client of one server and one API key.

    ``ClientError`` for a key that no header can carry.
    """
    headers = {"user-agent": "prefixd-client"}
    key = (api_key or "").strip()  # one read from a file ends in a newline
    if not (key.isascii() and key.isprintable()):
        raise ClientError(
            "the API key contains a character that keys do not contain: copy it again"
        )
    if key:
        headers["authorization"] = f"Bearer {key}"
    limits = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))
    return HttpOptions(base_url=url, headers=headers, timeout=limits)


@contextmanager
def http_request(
    http: httpx2.Client | httpx2.AsyncClient, request: Request
) -> Iterator[httpx2.Request]:
    """The request ready to send; files of a multipart body stay open inside."""
    with ExitStack() as files:
        parts = [
            (
                part.name,
                (
                    part.filename,
                    files.enter_context(part.content.open("rb"))
                    if isinstance(part.content, Path)
                    else part.content,
                    part.content_type,
                ),
            )
            for part in request.parts
        ]
        body, content_type = _body(request)
        yield http.build_request(
            request.method,
            request.path,
            params=dict(request.params) or None,
            content=body,
            files=parts or None,
            headers={**request.headers, **({} if body is None else {"content-type": content_type})},
        )


def _body(request: Request) -> tuple[bytes | None, str]:
    if request.ndjson is not None:
        return request.ndjson, "application/x-ndjson"
    if request.octets is not None:
        octets = request.octets
        data = octets.read_bytes() if isinstance(octets, Path) else octets
        return data, "application/octet-stream"
    return None if request.json is None else dump(request.json), "application/json"


def plain_response(response: httpx2.Response) -> Response:
    """The response as plain data; its body must have been read."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Response(status=response.status_code, headers=headers, body=response.content)


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Raise httpx2's errors as ``ClientError``: callers need not know httpx2."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise ConnectError(f"cannot connect to {url}: {error or 'timed out'}") from error
    except httpx2.TimeoutException as error:
        raise TimedOutError(f"{url} did not respond in time") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ProtocolError(f"{url!r} is not the URL of a server: {error}") from error
    except httpx2.TransportError as error:
        raise TransportError(f"lost the connection to {url}: {error}") from error
