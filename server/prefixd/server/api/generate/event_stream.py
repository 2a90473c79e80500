"""From the engine's thread to asyncio, and from there to the client as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import (
    error_body,
    from_finish,
    from_queue_full,
    internal_error,
)
from prefixd.server.api.request_record import Admitted, ClientGone, RequestRecorder
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    QueueFull,
    TokenEvent,
)
from prefixd.server.errors import DeadlineExceeded, PrefixdError

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"

# The engine ends a request at its timeout; this is for an engine that hangs.
_TIMEOUT_SLACK_S = 1.0


@dataclass(slots=True, eq=False)
class Generation:
    """Runs an admitted request while entered; leaving early aborts the sequences still running.

    Entering raises Unavailable when the queue is full. ``recorder`` counts the events.
    """

    engine: Engine
    admitted: Admitted
    drain_state: DrainState
    recorder: RequestRecorder
    _queue: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    _unfinished: int = 0

    async def __aenter__(self) -> Self:
        self._unfinished = self.admitted.num_choices
        self.drain_state.running.add(self)
        try:
            for position, request in enumerate(self.admitted.requests):
                self.engine.submit(request, self._listener(position * request.n))
        except QueueFull as full:
            # All prompts or none: the first ones must not run without the others.
            await self.__aexit__()
            raise from_queue_full(full, self.drain_state) from full
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.drain_state.running.discard(self)
        if self._unfinished:
            for request in self.admitted.requests:
                self.engine.abort(request.request_id)

    def end(self) -> None:
        """Make the next event an abort, without waiting for the engine."""
        self._queue.put_nowait((0, FinishEvent(0, FinishReason.ABORT, completion_tokens=0)))

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """``(choice, event)`` until all sequences have finished. Raises the error of the first
        sequence that failed, and DeadlineExceeded."""
        timeout = self.admitted.requests[0].timeout_s
        deadline = None
        if timeout is not None:
            deadline = asyncio.get_running_loop().time() + timeout + _TIMEOUT_SLACK_S
        while self._unfinished:
            try:
                async with asyncio.timeout_at(deadline):
                    choice, event = await self._queue.get()
            except TimeoutError:
                raise DeadlineExceeded("the request's timeout has passed") from None
            if isinstance(event, TokenEvent):
                self.recorder.token(choice, event)
            else:
                self._unfinished -= 1
                self.recorder.record.sequence_finished(choice, event)
                if event.reason not in {FinishReason.STOP, FinishReason.LENGTH}:
                    raise from_finish(event, self.drain_state)
            yield choice, event

    def _listener(self, first_choice: int) -> Callable[[Event], None]:
        """The engine's callback for one of the requests, called on the engine's thread."""
        loop, put = asyncio.get_running_loop(), self._queue.put_nowait

        def listen(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(put, (first_choice + event.index, event))

        return listen


class EventStream(Response):
    """Sends payloads as server-sent events, and at the end an error, if any, and ``[DONE]``.

    ``running`` is what the request holds: it is closed before ``[DONE]`` is sent, so that a client
    that has read it may send its next request, and also when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: dict[str, Any],
        payloads: AsyncGenerator[dict[str, Any]],
        *,
        running: AsyncExitStack,
        headers: Mapping[str, str],
        request_id: str | None,
    ) -> None:
        """``first`` was taken from ``payloads``: it decided that the status is 200."""
        self._first = first
        self._payloads = payloads
        self._running = running
        self._request_id = request_id
        self.status_code = 200
        self.background = None
        # nginx would buffer the stream otherwise.
        self.init_headers({**headers, "cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the payloads end or the client disconnects."""
        del scope
        failure: Exception | None = None
        try:
            async with self._running:
                await while_connected(receive, self._send_payloads(send))
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - sent to the client, and raised again below
            failure = error
        with suppress(OSError, ClientGone):  # the client has disconnected
            if failure is not None:
                shown = failure if isinstance(failure, PrefixdError) else internal_error()
                await _send_event(send, error_body(shown, self._request_id))
            await send({"type": "http.response.body", "body": DONE, "more_body": False})
        if failure is not None and not isinstance(failure, PrefixdError):
            raise failure  # for the log

    async def _send_payloads(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **start})
        except OSError as error:
            raise ClientGone from error
        await _send_event(send, self._first)
        async for payload in self._payloads:
            await _send_event(send, payload)


async def _send_event(send: Send, payload: dict[str, Any]) -> None:
    """Send one payload. Raises ClientGone."""
    body = b"data: " + to_json(payload) + b"\n\n"
    try:
        await send({"type": "http.response.body", "body": body, "more_body": True})
    except OSError as error:
        raise ClientGone from error


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Run ``work``, or cancel it and raise ClientGone when the client disconnects first.

    The body must have been read: the only message left to receive is the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        watching.cancel()
        # Cancelled work still frees what it holds.
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
