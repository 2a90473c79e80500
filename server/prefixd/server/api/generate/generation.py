"""A generation on the engine: its events go from the engine's thread to a task on the loop."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self
from weakref import WeakKeyDictionary

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import from_finish, from_queue_full
from prefixd.server.api.request_record import RequestRecorder
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    QueueFull,
    TokenEvent,
)
from prefixd.server.errors import DeadlineExceeded, PrefixdError

# The engine ends a request at its timeout; this is for an engine that hangs.
_TIMEOUT_SLACK_S = 1.0

Batch = list[tuple[int, Event]]
"""Events with their choices, that are ready at once."""


class EventDelivery:
    """Passes events of all generations to one event loop, with one wake-up for each step. Those of
    a step arrive together: the last text of an answer with its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # None is where a step ends: the loop may run while the next one adds its events.
        self._events: deque[tuple[Callable[[int, Event], None], int, Event] | None] = deque()

    def add(self, receive: Callable[[int, Event], None], first_choice: int, event: Event) -> None:
        """Have ``receive`` called on the loop after ``deliver``. In any thread."""
        self._events.append((receive, first_choice + event.index, event))

    def deliver(self) -> None:
        """Wake the loop. In any thread."""
        self._events.append(None)
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._receive)

    def _receive(self) -> None:
        while (added := self._events.popleft()) is not None:
            receive, choice, event = added
            receive(choice, event)


class EventDeliveries:
    """One EventDelivery for each event loop."""

    def __init__(self) -> None:
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, EventDelivery]
        self._by_loop = WeakKeyDictionary()

    def running(self) -> EventDelivery:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        delivery = self._by_loop.get(loop)
        if delivery is None:
            delivery = self._by_loop[loop] = EventDelivery(loop)
        return delivery


@dataclass(slots=True, eq=False)
class Generation:
    """Runs an admitted request while entered, and iterates over its events; leaving early aborts
    the sequences still running.

    Entering raises Unavailable when the queue is full. ``recorder`` counts the events.
    """

    engine: Engine
    admitted: Admitted
    drain_state: DrainState
    recorder: RequestRecorder
    delivery: EventDelivery
    _ready: deque[tuple[int, Event]] = field(default_factory=deque)
    _waiter: asyncio.Future[None] | None = None
    _unfinished: int = 0
    _failure: PrefixdError | None = None
    _deadline: float = math.inf
    _timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._unfinished = self.admitted.num_sequences
        timeout = self.admitted.requests[0].timeout_s
        if timeout is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.time() + timeout + _TIMEOUT_SLACK_S
            self._timer = loop.call_at(self._deadline, self._wake)
        self.drain_state.running.add(self)
        num_first = 1 if self._leads else len(self.admitted.requests)
        try:
            self._submit(0, num_first)
        except QueueFull as full:
            # All prompts or none: the first ones must not run without the others.
            await self.__aexit__()
            raise from_queue_full(full, self.drain_state) from full
        return self

    @property
    def _leads(self) -> bool:
        """Whether the first request runs before the others, which then share the blocks of what
        their prompts have in common."""
        admitted, size = self.admitted, self.engine.config.block_size
        return admitted.requests[0].kv_reuse and admitted.shared_tokens >= size

    def _submit(self, start: int, stop: int) -> None:
        for position, request in enumerate(self.admitted.requests[start:stop], start=start):
            on_event = partial(self.delivery.add, self._receive, position * request.n)
            self.engine.submit(request, on_event, deliver=self.delivery.deliver)

    def _follow(self) -> PrefixdError | None:
        """Submit the requests behind the first; the error where they cannot be."""
        try:
            self._submit(1, len(self.admitted.requests))
        except QueueFull as full:
            error = from_queue_full(full, self.drain_state)
            error.__cause__ = full
            return error
        return None

    async def __aexit__(self, *exception: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.drain_state.running.discard(self)
        if self._unfinished:
            for request in self.admitted.requests:
                self.engine.abort(request.request_id)

    def end(self) -> None:
        """Make the next event an abort, without waiting for the engine."""
        self._receive(0, FinishEvent(0, FinishReason.ABORT, completion_tokens=0))

    def __aiter__(self) -> Self:
        """All events that are ready, again and again until all sequences have finished. Raises the
        error of the first sequence that failed, and DeadlineExceeded."""
        return self

    # Not a generator: resuming one takes longer, and a stream does it for every token.
    async def __anext__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        if not self._unfinished:
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        if not self._ready and loop.time() < self._deadline:
            self._waiter = loop.create_future()
            await self._waiter
        if not self._ready:
            raise DeadlineExceeded("the request's timeout has passed")
        batch, self._failure = self._take()
        if not batch and self._failure is not None:
            raise self._failure
        return batch

    def _take(self) -> tuple[Batch, PrefixdError | None]:
        """Count and take what is ready, up to the first sequence that failed; and its error."""
        batch: Batch = []
        failure = None
        counts: dict[int, int] = {}  # a step may give several tokens of one sequence
        now = time.perf_counter()
        while self._ready:
            choice, event = self._ready.popleft()
            if isinstance(event, TokenEvent):
                counts[choice] = counts.get(choice, 0) + len(event.token_ids)
            elif isinstance(event, FinishEvent):
                self._unfinished -= 1
                self.recorder.record.sequence_finished(choice, event)
                if event.reason not in {FinishReason.STOP, FinishReason.LENGTH}:
                    said = None if event.error is None else self.admitted.explained(event.error)
                    failure = from_finish(replace(event, error=said), self.drain_state)
                    break
                if choice == 0 and self._leads and (failure := self._follow()) is not None:
                    break
            batch.append((choice, event))
        for choice, count in counts.items():
            self.recorder.tokens(choice, count, now=now)
        return batch, failure

    def _receive(self, choice: int, event: Event) -> None:
        self._ready.append((choice, event))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
