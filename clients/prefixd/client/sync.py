"""The synchronous client: sends calls of ``prefixd.client.protocol`` and nothing else."""

import random
import time
from collections.abc import Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx2

from prefixd.client import protocol, protocol_admin, protocol_users
from prefixd.client._http import (
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    built,
    client_options,
    plain,
    translated,
)
from prefixd.client.answers import prefix_used, refusal
from prefixd.client.errors import ClientError
from prefixd.client.protocol import Call, Request, StreamCall
from prefixd.client.retry import RetryPolicy
from prefixd.client.streams import ChunkReader
from prefixd.client.types import CompletionChunk, PrefixUsed

P = ParamSpec("P")
T = TypeVar("T")


def _call(build: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    """A method with the operation's own signature and docstring that sends it."""

    @wraps(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return method


def _stream(build: Callable[P, StreamCall]) -> "Callable[Concatenate[Client, P], Stream]":
    @wraps(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "Stream":
        return Stream(self, build(*args, **kwargs))

    return method


class Client:
    """Talks to one server as one API key. Close it, or use it in a ``with``.

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
        with translated(url):
            options = client_options(url, api_key=api_key, timeout=timeout)
            self._http = httpx2.Client(**options, transport=transport)

    upload = _call(protocol.upload)
    upload_folder = _call(protocol.upload_folder)
    upload_text = _call(protocol.upload_text)
    list_prefixes = _call(protocol.list_prefixes)
    show_prefix = _call(protocol.show_prefix)
    list_versions = _call(protocol.list_versions)
    set_alias = _call(protocol.set_alias)
    remove_alias = _call(protocol.remove_alias)
    warm = _call(protocol.warm)
    pin = _call(protocol.pin)
    unpin = _call(protocol.unpin)
    delete_prefix = _call(protocol.delete_prefix)
    complete = _call(protocol.complete)
    chat = _call(protocol.chat)
    stream_complete = _stream(protocol.stream_complete)
    stream_chat = _stream(protocol.stream_chat)
    bind_user = _call(protocol_users.bind_user)
    show_binding = _call(protocol_users.show_binding)
    unbind_user = _call(protocol_users.unbind_user)
    list_bindings = _call(protocol_users.list_bindings)
    import_bindings = _call(protocol_users.import_bindings)
    show_default = _call(protocol_users.show_default)
    set_default = _call(protocol_users.set_default)
    remove_default = _call(protocol_users.remove_default)
    list_tenants = _call(protocol_admin.list_tenants)
    create_tenant = _call(protocol_admin.create_tenant)
    show_tenant = _call(protocol_admin.show_tenant)
    set_tenant = _call(protocol_admin.set_tenant)
    set_quota = _call(protocol_admin.set_quota)
    list_keys = _call(protocol_admin.list_keys)
    create_key = _call(protocol_admin.create_key)
    rotate_key = _call(protocol_admin.rotate_key)
    revoke_key = _call(protocol_admin.revoke_key)
    read_audit = _call(protocol_admin.read_audit)
    list_models = _call(protocol.list_models)
    metrics = _call(protocol.metrics)
    is_live = _call(protocol.is_live)
    is_ready = _call(protocol.is_ready)

    def send(self, call: Call[T]) -> T:
        """Send one call and read its answer; sends again where that is safe."""

        def once() -> T:
            with translated(self.url), built(self._http, call.request) as request:
                response = plain(self._http.send(request))
            return call.parse(response)

        return self._retried(once)

    def open_stream(self, request: Request) -> httpx2.Response:
        """Send a request whose answer is read as it comes; the caller closes the response."""

        def once() -> httpx2.Response:
            with translated(self.url), built(self._http, request) as outgoing:
                response = self._http.send(outgoing, stream=True)
                if response.status_code != 200:
                    response.read()
                    raise refusal(plain(response))
                return response

        return self._retried(once)

    def _retried(self, once: Callable[[], T]) -> T:
        attempt = 1
        while True:
            try:
                return once()
            except ClientError as error:
                wait = self._retry.wait(error, attempt=attempt, jitter=random.random())
                if wait is None:
                    raise
            self._sleep(wait)
            attempt += 1

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
    """A generation as it comes: iterate for its chunks. Sent on the first one, or by ``with``.

    Leaving the loop or the ``with`` early closes the connection, and the server stops generating.
    ``prefix`` and ``request_id`` are known once it is sent.
    """

    def __init__(self, client: Client, call: StreamCall) -> None:
        self._client = client
        self._call = call
        self._response: httpx2.Response | None = None
        self.prefix: PrefixUsed | None = None
        self.request_id: str | None = None

    def __enter__(self) -> Self:
        if self._response is None:
            self._response = self._client.open_stream(self._call.request)
            self.prefix = prefix_used(self._response.headers)
            self.request_id = self._response.headers.get("x-request-id")
        return self

    def __iter__(self) -> Iterator[CompletionChunk]:
        with self, translated(self._client.url):
            assert self._response is not None
            reader = ChunkReader(self._call.parse)
            for data in self._response.iter_bytes():
                yield from reader.feed(data)
            reader.finish()

    def close(self) -> None:
        """Close the connection; nothing more comes."""
        if self._response is not None:
            self._response.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
