"""The engine: a thread that runs the core, and the methods that other threads call.

Other threads reach the core in two ways. They post functions, which the engine's thread calls
between two turns; and they read what the core has published. Everything that needs a lock is here.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.core import EngineCore
from prefixd.server.engine.detokenizer import Detokenizer
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.prefix_source import PrefixSource
from prefixd.server.engine.preloads import preloads_full
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    QueueFull,
)
from prefixd.server.engine.runner import ModelRunner
from prefixd.server.engine.stats import EngineStats, debug_state

log = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 2.0


class Engine:
    """Runs requests. Every public method may be called from any thread.

    The core is public for functions that are posted, and for tests once the engine has stopped.
    """

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        runner: ModelRunner,
        source: PrefixSource,
        detokenizer: Callable[[Sequence[int]], Detokenizer],
        namespace: str = "",
        fetch_threads: int = 2,
        watchdog_s: float = 60.0,
    ) -> None:
        """``detokenizer`` makes one from the prompt of each sequence. ``namespace`` names what KV
        depends on besides tokens: fingerprint and dtype. A step that takes longer than
        ``watchdog_s`` seconds makes the engine not ready."""
        self.config = config
        self._watchdog_s = watchdog_s
        self._queue_limiter = QueueLimiter(config)
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._stats_requests: deque[Future[EngineStats]] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._busy = False
        self._final_state: Future[dict[str, Any]] = Future()
        self.core = EngineCore(
            config=config,
            runner=runner,
            source=source,
            outputs=OutputProcessor(detokenizer),
            queue_limiter=self._queue_limiter,
            namespace=namespace,
            fetch_threads=fetch_threads,
            post=self._post,
        )

    # -- requests ----

    def submit(
        self,
        request: AdmittedRequest,
        on_event: Callable[[Event], None],
        *,
        deliver: Callable[[], None] | None = None,
    ) -> None:
        """Queue a request. ``on_event`` is called on the engine's thread and must not block.

        ``deliver`` is called there after the events of a step, once for all requests with the
        same: so one wake-up of another thread is enough for a step.

        Raises QueueFull. After the engine has stopped, the events are aborts, on the caller's
        thread.
        """
        self._queue_limiter.enter(request)
        if not self._post(lambda: self.core.add(request, on_event, deliver)):
            for index in range(request.n):
                on_event(FinishEvent(index, FinishReason.ABORT, completion_tokens=0))
            if deliver is not None:
                deliver()

    def check_room(self, tenant: str, *, weight: float = 1.0, background: bool = False) -> None:
        """Raise QueueFull when ``submit`` would, for any request of ``tenant``, which may be of the
        ``background`` class: to be checked before the work of admission."""
        self._queue_limiter.check(tenant, weight=weight, background=background)

    def abort(self, request_id: str) -> None:
        """End a request's sequences now and free everything they hold; unknown ids are ignored."""
        self._post(lambda: self.core.abort(request_id))

    # -- prefixes ----

    def preload(self, handle: PrefixHandle, *, max_resident_tokens: int | None = None) -> None:
        """Load a prefix as soon as there is room for it, under its tenant's cap. Raises QueueFull
        when there are too many preloads and no other tenant has more of them."""
        if preloads_full(self.core.published.preloads, handle.key.tenant):
            raise QueueFull("too many prefixes are being warmed", retry_after=1.0)
        self._post(lambda: self.core.preload(handle, max_resident_tokens))

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Load these prefixes and keep them, and no others: they leave only where a request could
        never run otherwise. ``caps``: virtual tokens that tenants may have in the pool."""
        pins = tuple(handles)
        self._post(lambda: self.core.set_pins(pins, caps))

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Let versions that were deleted or replaced leave when their last sequence ends."""
        retired = tuple(keys)
        self._post(lambda: self.core.scheduler.prefix_loader.retire(retired))

    def forget_failure(self, key: PrefixKey) -> None:
        """Fetch a prefix at its next request although it recently failed to load: its content was
        uploaded again."""
        self._post(lambda: self.core.forget_failure(key))

    def tier(self, key: PrefixKey) -> str | None:
        """How far a prefix is: fetching, staged, compiling, resident, or in host memory."""
        return self.core.published.tiers.get(key)

    def held_prefixes(self) -> frozenset[PrefixKey]:
        """Prefixes in the pool, loading, or in host memory, after the last step."""
        tiers = self.core.published.tiers.copy()  # in one go, while the engine's thread goes on
        return frozenset(tiers)

    # -- inspection ----

    def stats(self) -> EngineStats:
        """The figures between two steps. If no step ends in time, those of at most a second before
        it began: the caller gets an answer even while a step hangs."""
        request: Future[EngineStats] = Future()
        with self._wake:
            if self._stopping or self._thread is None:
                return self.core.published.stats
            self._stats_requests.append(request)
            self._wake.notify()
        try:
            return request.result(_STATS_TIMEOUT_S)
        except TimeoutError:
            return self.core.published.stats

    def state(self, *, timeout_s: float = 5.0) -> dict[str, Any]:
        """What runs, waits and is resident between two steps (``debug_state``); after the engine
        has stopped, what it left. Raises TimeoutError when no step ends in time."""
        answer: Future[dict[str, Any]] = Future()
        if not self._post(lambda: self._answer_state(answer)):
            answer = self._final_state
        return answer.result(timeout_s)

    @property
    def ready(self) -> bool:
        """Whether steps are being run."""
        return self.trouble is None

    @property
    def trouble(self) -> str | None:
        """Why the engine is not ready, for the caller; None when it is. Of failures only those
        count that no request explains."""
        if self._queue_limiter.closed is not None:
            return self._queue_limiter.closed
        if self._thread is None or not self._thread.is_alive() or self._stopping:
            return "the engine is not running"
        now, core = time.monotonic(), self.core
        began = core.turn_began
        if began is not None and now - began > self._watchdog_s:
            return f"no step has ended for {now - began:.0f} s"
        return core.failures.trouble(now=now)

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        with self._wake:
            return not self._inbox and not self._busy

    # -- start and stop ----

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def drain(self, reason: str = "the server is shutting down") -> None:
        """Admit no new request from now on; those that are alive run on. A first reason stays."""
        self._queue_limiter.closed = self._queue_limiter.closed or reason

    def stop(self) -> None:
        """End the thread after the step in flight; sequences still alive are aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self.core.stop_threads()

    def _post(self, function: Callable[[], None]) -> bool:
        """Have ``function`` called on the engine's thread; False when the engine has stopped."""
        with self._wake:
            if self._closed:
                return False
            self._inbox.append(function)
            self._wake.notify()
            return True

    # -- the engine's thread ----

    def _loop(self) -> None:
        try:
            while True:
                try:
                    self._take_turns()
                    break
                except Exception as error:  # noqa: BLE001 - logged there
                    if not self.core.start_over(error):
                        break
                    self._end_turn()
        finally:
            with self._wake:
                self._stopping = self._closed = True
            self._empty_inbox()  # requests posted last are aborted; no more can come
            self.core.shut_down()
            self.core.build_stats()
            self._end_turn()
            self._answer_state(self._final_state)

    def _take_turns(self) -> None:
        """Until it is time to stop: call what was posted, then run a step."""
        timeout: float | None = None
        while self._take_inbox(timeout=timeout):
            timeout = 0.0 if self.core.turn() else self.core.idle_timeout()
            self._end_turn()

    def _take_inbox(self, *, timeout: float | None) -> bool:
        """Call what was posted, after waiting up to ``timeout`` seconds for it (None: without
        limit). False: time to stop."""
        with self._wake:
            if timeout != 0.0:
                self._wake.wait_for(self._has_reason_to_wake, timeout)
            posted, stopping = self._inbox, self._stopping
            self._inbox = deque()
            self._busy = True  # until the turn has ended
        try:
            while posted:
                posted.popleft()()
        finally:
            # The rest stays posted when one of them raises.
            with self._wake:
                self._inbox.extendleft(reversed(posted))
        return not stopping

    def _empty_inbox(self) -> None:
        """Call all that was posted, also after one that raises."""
        while self._inbox:
            try:
                self._take_inbox(timeout=0.0)
            except Exception:
                log.exception("a call posted to the engine failed while it ended")

    def _has_reason_to_wake(self) -> bool:
        return bool(self._inbox or self._stats_requests or self._stopping)

    def _end_turn(self) -> None:
        """Answer requests for the figures, and note whether anything is alive."""
        if self._stats_requests:
            stats = self.core.build_stats()
            while self._stats_requests:
                self._stats_requests.popleft().set_result(stats)
        scheduler = self.core.scheduler
        with self._wake:
            self._busy = not scheduler.idle

    def _answer_state(self, answer: Future[dict[str, Any]]) -> None:
        """Set ``debug_state`` as the result. An exception in it does not end the thread."""
        try:
            answer.set_result(debug_state(self.core.scheduler, now=time.monotonic()))
        except Exception as error:  # noqa: BLE001 - raised where the result is read
            answer.set_exception(error)
