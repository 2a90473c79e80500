"""The synchronous client: sends the calls of ``prefixd.client.protocol``."""

import random
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import httpx2

from prefixd.client.errors import ClientError
from prefixd.client.operations import Operations
from prefixd.client.streams import ChunkReader
from prefixd.client.transport import (
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    RetryPolicy,
    http_options,
    http_request,
    plain_response,
    translated_errors,
)
from prefixd.client.types import CompletionChunk, PrefixUsed
from prefixd.client.wire import Call, Request, StreamCall, error_of, prefix_used

T = TypeVar("T")


class Client(Operations):
    """Talks to one server with one API key. Close it, or use it in a ``with``.

    ``timeout`` is in seconds for each wait on the network. ``transport`` and ``sleep`` are for
    tests. Thread-safe.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = None,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url
        self._retry = retry or RetryPolicy()
        self._sleep = sleep
        with translated_errors(url):
            options = http_options(url, api_key=api_key, timeout=timeout)
            self._http = httpx2.Client(**options, transport=transport)

    def send(self, call: Call[T]) -> T:
        """Send one call and parse its response; retries where ``RetryPolicy`` allows."""

        def attempt() -> T:
            with translated_errors(self.url), http_request(self._http, call.request) as request:
                response = plain_response(self._http.send(request))
            return call.parse(response)

        return self._with_retries(attempt, call.request)

    def stream(self, call: StreamCall) -> "Stream":
        """The stream that answers ``call``; sent when it is iterated or entered."""
        return Stream(self, call)

    def open_stream(self, request: Request) -> httpx2.Response:
        """Send a request whose response is read incrementally; the caller closes the response."""

        def attempt() -> httpx2.Response:
            with translated_errors(self.url), http_request(self._http, request) as outgoing:
                response = self._http.send(outgoing, stream=True)
                if response.status_code != 200:
                    response.read()
                    raise error_of(plain_response(response))
                return response

        return self._with_retries(attempt, request)

    def _with_retries(self, attempt: Callable[[], T], request: Request) -> T:
        attempts = 1
        while True:
            try:
                return attempt()
            except ClientError as error:
                jitter, repeat = random.random(), request.repeat
                wait = self._retry.wait(error, attempt=attempts, jitter=jitter, repeat=repeat)
                if wait is None:
                    raise
            self._sleep(wait)
            attempts += 1

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Stream:
    """A streamed generation: iterate for its chunks.

    Sent on the first iteration, or on entering ``with``. Leaving the loop or the ``with`` early
    closes the connection, and the server stops generating. ``prefix`` and ``request_id`` are None
    until it is sent.
    """

    def __init__(self, client: Client, call: StreamCall) -> None:
        self._client = client
        self._call = call
        self._response: httpx2.Response | None = None
        self._reader = ChunkReader()
        self.prefix: PrefixUsed | None = None
        self.request_id: str | None = None

    def __enter__(self) -> Self:
        if self._response is None:
            self._response = self._client.open_stream(self._call.request)
            self.prefix = prefix_used(self._response.headers)
            self.request_id = self._response.headers.get("x-request-id")
        return self

    def __iter__(self) -> Iterator[CompletionChunk]:
        with self, translated_errors(self._client.url):
            assert self._response is not None
            reader = self._reader
            for data in self._response.iter_bytes():
                yield from reader.feed(data)
            reader.finish()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was likely not meant, as the first chunk says."""
        return self._reader.warnings

    def close(self) -> None:
        """Close the connection; no more chunks come."""
        if self._response is not None:
            self._response.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
