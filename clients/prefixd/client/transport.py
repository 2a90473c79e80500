"""What both clients share around httpx2: requests, responses, errors and the retry policy."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import httpx2

from prefixd.client.errors import (
    ApiError,
    ClientError,
    ConnectError,
    DeadlineError,
    ProtocolError,
    RateLimitError,
    TimedOutError,
    TransportError,
    UnavailableError,
)
from prefixd.client.wire import Progress, Repeat, Request, Response, dump, encoded_text

DEFAULT_URL = "http://127.0.0.1:8000"
# In seconds. Without streaming, a read lasts as long as the generation.
DEFAULT_TIMEOUT = 300.0
CONNECT_TIMEOUT = 5.0

PIECE = 64 * 1024
"""Bytes of a body between two calls of ``progress``."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Which failures are retried, and after how long: up to ``max_retries`` times. The waits double
    from ``first_wait`` seconds to ``max_wait``. The server's ``Retry-After`` replaces them; if it
    exceeds ``max_wait``, the error is raised instead.

    ============================  ====================  ================  ====================
    failure                       reads, and changes    generations       ``DELETE``, ``PATCH``
                                  with a key
    ============================  ====================  ================  ====================
    no connection, 429            yes                   yes               yes
    503                           yes                   yes               full or not ready
    connection lost, 502          yes                   see below         no
    504 of a proxy                yes                   no                no
    ============================  ====================  ================  ====================

    A generation whose connection is lost is sent again while nothing of its answer was returned: a
    whole answer until it is complete, a stream until it has begun. A timeout of the client or of
    the request is never retried.
    """

    max_retries: int = 3
    first_wait: float = 0.25
    max_wait: float = 10.0

    def wait(
        self, error: ClientError, *, attempt: int, jitter: float, repeat: Repeat
    ) -> float | None:
        """Seconds to wait after try number ``attempt`` (from 1) failed; None to give up.

        ``jitter`` in [0, 1) spreads clients that failed together over the upper half of the wait.
        """
        if attempt > self.max_retries or not _may_repeat(error, repeat):
            return None
        if isinstance(error, ApiError) and error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.max_wait else None
        longest = min(self.first_wait * 2.0 ** (attempt - 1), self.max_wait)
        return longest * (0.5 + jitter / 2)


_NOT_BEGUN = {"unavailable", "overloaded", "too_many_connections"}
"""Codes of a 503 that the server sends before it begins a request."""


def _may_repeat(error: ClientError, repeat: Repeat) -> bool:
    if isinstance(error, ConnectError | RateLimitError):
        return True
    if isinstance(error, UnavailableError):
        return repeat is not Repeat.REFUSED or error.code in _NOT_BEGUN
    if type(error) is TransportError or (isinstance(error, ApiError) and error.status == 502):
        return repeat is not Repeat.REFUSED
    # The server's own 504 has a code: it is the request's timeout.
    return isinstance(error, DeadlineError) and error.code is None and repeat is Repeat.LOST


class HttpOptions(TypedDict):
    """Keyword arguments that both httpx2 clients take."""

    base_url: str
    headers: dict[str, str]
    timeout: httpx2.Timeout


def http_options(url: str, *, api_key: str | None, timeout: float) -> HttpOptions:
    """Options for an httpx2 client of one server and one API key.

    ``ClientError`` for a URL or a key that cannot be sent.
    """
    with encoded_text():
        url.encode()
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
        content = {} if body is None else {"content-type": content_type}
        with encoded_text():
            outgoing = http.build_request(
                request.method,
                request.path,
                params=dict(request.params) or None,
                content=body,
                files=parts or None,
                headers={**request.headers, **content},
            )
        if request.progress is not None:
            total = int(outgoing.headers["content-length"])
            outgoing.stream = _ReportedBody(outgoing.stream, total, request.progress)
        yield outgoing


class _ReportedBody(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that is sent in pieces and counted. A piece counts when the next one is asked for."""

    def __init__(self, body: object, total: int, progress: Progress) -> None:
        self._body = body
        self._total = total
        self._progress = progress

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._body, httpx2.SyncByteStream)
        sent = 0
        self._progress(sent, self._total)
        for data in self._body:
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                yield piece
                sent += len(piece)
                self._progress(sent, self._total)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:  # files are read without waiting, as httpx2's own bodies read them
            yield piece


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
