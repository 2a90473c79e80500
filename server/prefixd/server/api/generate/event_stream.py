"""From the engine's thread to asyncio: one request's events as an asynchronous iterator."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from starlette.types import Receive

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.generate.admission import Admitted
from prefixd.server.api.generate.error_responses import refusal_of
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import Event, FinishEvent, FinishReason, QueueFull
from prefixd.server.errors import DeadlineExceeded

Result = TypeVar("Result")

# The engine ends a request at its timeout; this is for one that hangs and ends nothing.
_SLACK_S = 1.0


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


class Generation:
    """Runs an admitted request while entered; leaving it early aborts what still runs.

    Entering raises Unavailable when the engine takes no more. Iterating yields ``(choice, event)``
    until every sequence has finished.
    """

    def __init__(self, engine: Engine, admitted: Admitted, drain_state: DrainState) -> None:
        self._engine = engine
        self._intake = drain_state
        self._requests = admitted.requests
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = admitted.num_choices
        self._deadline: float | None = None

    async def __aenter__(self) -> Self:
        first_choice = 0
        timeout = self._requests[0].timeout_s
        if timeout is not None:
            self._deadline = self._loop.time() + timeout + _SLACK_S
        self._intake.running.add(self)
        try:
            for request in self._requests:
                self._engine.submit(request, self._from_engine(first_choice))
                first_choice += request.n
        except QueueFull as full:
            # All prompts or none: those before it would run for nobody.
            await self.__aexit__()
            raise refusal_of(full, self._intake) from full
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._intake.running.discard(self)
        if self._open:
            for request in self._requests:
                self._engine.abort(request.request_id)

    def end(self) -> None:
        """Have the next event say that this was aborted, whatever the engine does."""
        self._events.put_nowait((0, FinishEvent(0, FinishReason.ABORT, completion_tokens=0)))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._open:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout_at(self._deadline):
                choice, event = await self._events.get()
        except TimeoutError:
            raise DeadlineExceeded("the request's timeout has passed") from None
        if isinstance(event, FinishEvent):
            self._open -= 1
        return choice, event

    def _from_engine(self, first_choice: int) -> "_Listener":
        return _Listener(self._loop, self._events, first_choice)


class _Listener:
    """What the engine calls, on its own thread, for one of the requests."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        events: asyncio.Queue[tuple[int, Event]],
        first_choice: int,
    ) -> None:
        self._loop = loop
        self._events = events
        self._first_choice = first_choice

    def __call__(self, event: Event) -> None:
        item = (self._first_choice + event.index, event)
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, item)
        except RuntimeError:
            # The loop is closed: the server is gone and nobody listens.
            return


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work``, or cancel it and raise ClientGone when the client goes away first.

    The body must have been read: ``receive`` then has nothing but the disconnect to tell.
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
        # Wait for the cancelled work: it frees what it holds on its way out.
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
