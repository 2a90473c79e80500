"""The asynchronous client: the same calls as ``prefixd.client.sync``, awaited (asyncio or trio)."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import anyio
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


def _call(build: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Awaitable[T]]":
    """A coroutine method with the operation's own signature and docstring that sends it."""

    @wraps(build)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return method


def _stream(build: Callable[P, StreamCall]) -> "Callable[Concatenate[AsyncClient, P], AsyncStream]":
    @wraps(build)
    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncStream":
        return AsyncStream(self, build(*args, **kwargs))

    return method


class AsyncClient:
    """Talks to one server as one API key. Close it, or use it in an ``async with``.

    ``timeout`` is in seconds for each wait on the network. ``transport`` and ``sleep`` are for
    tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.url = url
        self._retry = retry or RetryPolicy()
        self._sleep = sleep
        with translated(url):
            options = client_options(url, api_key=api_key, timeout=timeout)
            self._http = httpx2.AsyncClient(**options, transport=transport)

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

    async def send(self, call: Call[T]) -> T:
        """Send one call and read its answer; sends again where that is safe."""

        async def once() -> T:
            with translated(self.url), built(self._http, call.request) as request:
                response = plain(await self._http.send(request))
            return call.parse(response)

        return await self._retried(once)

    async def open_stream(self, request: Request) -> httpx2.Response:
        """Send a request whose answer is read as it comes; the caller closes the response."""

        async def once() -> httpx2.Response:
            with translated(self.url), built(self._http, request) as outgoing:
                response = await self._http.send(outgoing, stream=True)
                if response.status_code != 200:
                    await response.aread()
                    raise refusal(plain(response))
                return response

        return await self._retried(once)

    async def _retried(self, once: Callable[[], Awaitable[T]]) -> T:
        attempt = 1
        while True:
            try:
                return await once()
            except ClientError as error:
                wait = self._retry.wait(error, attempt=attempt, jitter=random.random())
                if wait is None:
                    raise
            await self._sleep(wait)
            attempt += 1

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncStream:
    """A generation as it comes: iterate for its chunks.

    Sent on the first one, or by ``async with``. Leaving the ``async with`` early closes
    the connection, and the server stops generating. ``prefix`` and ``request_id`` are known
    once it is sent.
    """

    def __init__(self, client: AsyncClient, call: StreamCall) -> None:
        self._client = client
        self._call = call
        self._response: httpx2.Response | None = None
        self.prefix: PrefixUsed | None = None
        self.request_id: str | None = None

    async def __aenter__(self) -> Self:
        if self._response is None:
            self._response = await self._client.open_stream(self._call.request)
            self.prefix = prefix_used(self._response.headers)
            self.request_id = self._response.headers.get("x-request-id")
        return self

    async def __aiter__(self) -> AsyncIterator[CompletionChunk]:
        async with self:
            assert self._response is not None
            reader = ChunkReader(self._call.parse)
            with translated(self._client.url):
                async for data in self._response.aiter_bytes():
                    for chunk in reader.feed(data):
                        yield chunk
            reader.finish()

    async def close(self) -> None:
        """Close the connection; nothing more comes."""
        if self._response is not None:
            await self._response.aclose()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
