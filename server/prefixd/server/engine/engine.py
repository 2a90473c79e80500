"""The engine as other threads see it: requests go in, events come out."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.loop import StepLoop
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.prefix_loader import preloads_full
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.recovery import Watchdog
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    QueueFull,
)
from prefixd.server.engine.stats import EngineStats
from prefixd.server.engine.step import Detokenizer, ModelRunner, PrefixSource


class Engine:
    """Runs requests. Every method may be called from any thread: it posts to the loop, or reads
    what the loop has published."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        runner: ModelRunner,
        source: PrefixSource,
        detokenizer: Callable[[], Detokenizer],
        namespace: str = "",
        fetch_threads: int = 2,
        watchdog_s: float = 60.0,
    ) -> None:
        """``detokenizer`` makes a new one for each sequence. ``namespace`` names what KV depends on
        besides tokens: fingerprint and dtype. A step that takes longer than ``watchdog_s`` seconds
        makes the engine not ready."""
        self.config = config
        self._queue_limiter = QueueLimiter(config)
        self._watchdog = Watchdog(timeout_s=watchdog_s)
        self.loop = StepLoop(
            config=config,
            runner=runner,
            source=source,
            outputs=OutputProcessor(detokenizer),
            queue_limiter=self._queue_limiter,
            watchdog=self._watchdog,
            namespace=namespace,
            fetch_threads=fetch_threads,
        )

    # -- requests ----

    def submit(self, request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request. ``on_event`` is called on the engine's thread and must not block.

        Raises QueueFull. After the engine has stopped, the events are aborts, on the caller's
        thread.
        """
        self._queue_limiter.enter(request)
        if not self.loop.post(lambda: self.loop.add(request, on_event)):
            for index in range(request.n):
                on_event(FinishEvent(index, FinishReason.ABORT, completion_tokens=0))

    def check_room(self, tenant: str, *, weight: float = 1.0) -> None:
        """Raise QueueFull when ``submit`` would, for any request of ``tenant``: to be checked
        before the work of admission."""
        self._queue_limiter.check(tenant, weight=weight)

    def abort(self, request_id: str) -> None:
        """End a request's sequences now and free everything they hold; unknown ids are ignored."""
        self.loop.post(lambda: self.loop.abort(request_id))

    # -- prefixes ----

    def preload(self, handle: PrefixHandle, *, max_resident_tokens: int | None = None) -> None:
        """Load a prefix as soon as there is room for it, under its tenant's cap. Raises QueueFull
        when there are too many preloads and no other tenant has more of them."""
        if preloads_full(self.loop.preloads, handle.key.tenant):
            raise QueueFull("too many prefixes are being warmed", retry_after=1.0)
        self.loop.post(lambda: self.loop.preload(handle, max_resident_tokens))

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Load these prefixes and keep them, and no others: they leave only where a request could
        never run otherwise. ``caps``: virtual tokens that tenants may have in the pool."""
        pins = tuple(handles)
        self.loop.post(lambda: self.loop.set_pins(pins, caps))

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Let versions that were deleted or replaced leave when their last sequence ends."""
        retired = tuple(keys)
        self.loop.post(lambda: self.loop.scheduler.prefix_loader.retire(retired))

    def tier(self, key: PrefixKey) -> str | None:
        """How far a prefix is: fetching, staged, compiling, resident, or in host memory."""
        return self.loop.tiers.get(key)

    # -- inspection ----

    def stats(self) -> EngineStats:
        """The figures between two steps."""
        return self.loop.stats()

    def state(self, *, timeout_s: float = 5.0) -> dict[str, Any]:
        """What runs, waits and is resident between two steps (``debug_state``); after the loop has
        ended, what it left. Raises TimeoutError when no step ends in time."""
        answer: Future[dict[str, Any]] = Future()
        if not self.loop.post(lambda: self.loop.answer_state(answer)):
            answer = self.loop.final_state
        return answer.result(timeout_s)

    @property
    def ready(self) -> bool:
        """Whether steps are being run."""
        return self.trouble is None

    @property
    def trouble(self) -> str | None:
        """Why the engine is not ready, in a sentence."""
        if self._queue_limiter.closed is not None:
            return self._queue_limiter.closed
        if not self.loop.running:
            return "the engine is not running"
        return self._watchdog.trouble(now=time.monotonic())

    @property
    def idle(self) -> bool:
        """Whether no request is alive."""
        return self.loop.idle

    # -- its life ----

    def start(self) -> None:
        """Start the step loop."""
        self.loop.start()

    def drain(self) -> None:
        """Admit no new request from now on; those that are alive run on."""
        self._queue_limiter.closed = "the server is shutting down"

    def stop(self) -> None:
        """End the loop after the step in flight; sequences still alive are aborted."""
        self.loop.stop()
