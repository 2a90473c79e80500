"""A response of server-sent events, as long as its client is connected."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefixd.server.api.error_responses import internal_error
from prefixd.server.api.request_record import ClientGone
from prefixd.server.errors import PrefixdError

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends server-sent events, and at the end what ``ending`` makes of the error, if any.

    ``running`` is what the request holds: it is closed before the end is sent, so that a client
    that has read it may send its next request. With ``while_connected`` among it, also when the
    client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        chunks: AsyncGenerator[bytes],
        *,
        running: AsyncExitStack,
        headers: Mapping[str, str],
        ending: Callable[[PrefixdError | None], bytes],
    ) -> None:
        """``first`` was taken from ``chunks``: it decided that the status is 200. Each has one or
        more events, of which all that were ready are sent at once."""
        self._first = first
        self._chunks = chunks
        self._running = running
        self._ending = ending
        self.status_code = 200
        self.background = None
        # nginx would buffer the stream otherwise.
        self.init_headers({**headers, "cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the chunks end or the client disconnects."""
        del scope, receive
        failure: Exception | None = None
        try:
            async with self._running:
                # A task of its own: a token resumes it and not all layers around the application.
                await asyncio.create_task(self._send_chunks(send))
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - sent to the client, and raised again below
            failure = error
        with suppress(OSError, ClientGone):  # the client has disconnected
            if failure is None or isinstance(failure, PrefixdError):
                body = self._ending(failure)
            else:
                body = self._ending(internal_error())
            await send({"type": "http.response.body", "body": body, "more_body": False})
        if failure is not None and not isinstance(failure, PrefixdError):
            raise failure  # for the log

    async def _send_chunks(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **start})
        except OSError as error:
            raise ClientGone from error
        await _send(send, self._first)
        async for chunk in self._chunks:
            try:  # as ``_send``, without a call for each token
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except OSError as error:
                raise ClientGone from error


async def _send(send: Send, body: bytes) -> None:
    """Send a part of the body. Raises ClientGone."""
    try:
        await send({"type": "http.response.body", "body": body, "more_body": True})
    except OSError as error:
        raise ClientGone from error


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel what runs inside when the client disconnects, and raise ClientGone.

    The body must have been read: the only message left to receive is the disconnect.
    """
    task = asyncio.current_task()
    assert task is not None
    earlier, inside, gone = task.cancelling(), True, False

    def cancel(watching: asyncio.Task[None]) -> None:
        nonlocal gone
        if inside and not watching.cancelled():
            gone = True
            task.cancel()

    watching = asyncio.create_task(_disconnected(receive))
    watching.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError as error:
        if gone and task.cancelling() == earlier + 1:
            raise ClientGone from error
        raise
    finally:
        inside = False
        watching.cancel()
        if gone:
            task.uncancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
