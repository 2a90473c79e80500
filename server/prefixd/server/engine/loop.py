"""The step loop: one thread that runs schedule, run, update until it is stopped.

The scheduler and the runner are touched by this thread alone, so neither needs a lock. Other
threads post functions to its inbox, and read what it publishes: ``tiers`` and ``preloads`` as of
the last turn, and the figures, which are built when they are asked for::

    take the inbox ──> expire ──> schedule ──> fetch ──> run ──> update ──> publish
         ^                                   (threads)  (device)                │
         └──────────────────────────────────────────────────────────────────────┘
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.recovery import Watchdog
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishReason,
    PrefixHandle,
    PrefixKey,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import End, Sequence, seeded_uniform, sequences_of
from prefixd.server.engine.stats import EngineStats, StatsKeeper, debug_state, tiers_of
from prefixd.server.engine.step import (
    ModelRunner,
    OutOfMemory,
    PrefixSource,
    PrefixUnavailable,
    StagedPrefix,
    Step,
)

log = logging.getLogger(__name__)

_IDLE_POLL_S = 0.05
"""How often the loop looks again at what waits when no step can be run."""

_STATS_TIMEOUT_S = 0.5
_STATS_MAX_AGE_S = 1.0


class StepLoop:
    """Owns the scheduler and all that runs on the engine's thread.

    The scheduler is public for functions that are posted, and for tests once the loop has stopped.
    """

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        runner: ModelRunner,
        source: PrefixSource,
        outputs: OutputProcessor,
        queue_limiter: QueueLimiter,
        watchdog: Watchdog,
        namespace: str,
        fetch_threads: int,
    ) -> None:
        self._config = config
        self._runner = runner
        self._source = source
        self._outputs = outputs
        self._queue_limiter = queue_limiter
        self._watchdog = watchdog
        self._namespace = namespace
        self._fetch_pool = ThreadPoolExecutor(fetch_threads, thread_name_prefix="prefix-fetch")
        self._inbox: deque[Callable[[], None]] = deque()
        self._stats_requests: deque[Future[EngineStats]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._busy = False
        self._next_id = 0
        self._pins: tuple[tuple[PrefixHandle, ...], Mapping[str, int] | None] = (), None
        self._stats = StatsKeeper()
        self._published: tuple[Scheduler, int, int, int] | None = None
        self._queue_published = False
        self.scheduler = self._new_scheduler()
        self.tiers: Mapping[PrefixKey, str] = {}
        self.preloads: Mapping[str, int] = {}
        self._snapshot, self._snapshot_at = self._stats.snapshot(self.scheduler, {}), 0.0
        self.final_state: Future[dict[str, Any]] = Future()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self._config,
            uniform=seeded_uniform,
            flush=self._outputs.flush,
            namespace=self._namespace,
        )

    # -- for any thread ----

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in flight; sequences still alive are aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._fetch_pool.shutdown(wait=True, cancel_futures=True)

    @property
    def running(self) -> bool:
        """Whether the thread runs and is not about to stop."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def idle(self) -> bool:
        """Whether no request is alive."""
        with self._wake:
            return not self._inbox and not self._busy

    def post(self, function: Callable[[], None]) -> bool:
        """Have ``function`` called on the engine's thread; False when the loop has ended."""
        with self._wake:
            if self._closed:
                return False
            self._inbox.append(function)
            self._wake.notify()
            return True

    def stats(self) -> EngineStats:
        """The figures between two steps. Those of a second before a step that does not end in time,
        at most, so that the caller gets an answer though a step hangs."""
        request: Future[EngineStats] = Future()
        with self._wake:
            if not self.running:
                return self._snapshot
            self._stats_requests.append(request)
            self._wake.notify()
        try:
            return request.result(_STATS_TIMEOUT_S)
        except TimeoutError:
            return replace(self._snapshot, tiers=self.tiers)

    # -- the loop ----

    def _loop(self) -> None:
        try:
            while True:
                try:
                    self._take_turns()
                    break
                except Exception as error:  # noqa: BLE001 - logged there
                    if not self._start_over(error):
                        break
        finally:
            with self._wake:
                self._stopping = self._closed = True
            self._take_inbox(timeout=0.0)  # requests posted last are aborted; no more can come
            self.end(self._outputs.all(), FinishReason.ABORT)
            self.publish()
            self._answer_stats()
            self.answer_state(self.final_state)

    def _take_turns(self) -> None:
        """Until it is time to stop: call what was posted, run a step, and report its output."""
        busy = False
        while self._take_inbox(timeout=0.0 if busy else self._idle_timeout()):
            now = time.monotonic()
            self._watchdog.turn_began = now
            if self.scheduler.deadlines.next_at <= now:
                self._close(self.scheduler.expire(now=now))
            step = self.scheduler.schedule(now=now)
            for key in step.fetches:
                self._fetch_pool.submit(self._fetch, self.scheduler, key)
            busy = step.has_work
            if busy:
                self._run(step, now)
            self.publish()
            self._watchdog.turn_began = None

    def _idle_timeout(self) -> float | None:
        """Seconds to sleep when there is no step to run; None: until something is posted."""
        if self.scheduler.idle and not self.scheduler.prefix_loader.preloads.pending:
            return None
        until_expiry = max(0.0, self.scheduler.deadlines.next_at - time.monotonic())
        return min(_IDLE_POLL_S, until_expiry)

    def _take_inbox(self, *, timeout: float | None) -> bool:
        """Call what was posted, after waiting up to ``timeout`` seconds for it (None: for ever).
        False: time to stop."""
        with self._wake:
            if timeout != 0.0:
                self._wake.wait_for(self._has_reason_to_wake, timeout)
            posted, stopping = self._inbox, self._stopping
            self._inbox = deque()
            self._busy = True  # until ``publish`` has looked
        try:
            while posted:
                posted.popleft()()
        finally:
            # The rest stays posted when one of them raises.
            with self._wake:
                self._inbox.extendleft(reversed(posted))
        return not stopping

    def _has_reason_to_wake(self) -> bool:
        return bool(self._inbox or self._stats_requests or self._stopping)

    def _run(self, step: Step, now: float) -> None:
        if now - self._snapshot_at > _STATS_MAX_AGE_S:
            self._build_stats(now)  # what ``stats`` returns if this step hangs
        started = time.perf_counter()
        try:
            output = self._runner.run(step)
        except Exception as error:  # noqa: BLE001 - logged there; a failed pass does not end the loop
            self._step_failed(step, error)
            return
        self._watchdog.num_failures = 0
        ends = self._outputs.push(output.sampled)
        ended = self.scheduler.update(step, output, ends)
        self._stats.step(step, time.perf_counter() - started, output)
        if ended:
            self._close(ended)

    def _step_failed(self, step: Step, error: Exception) -> None:
        """Log it, and let the scheduler go on with the parts that may succeed."""
        now = time.monotonic()
        out_of_memory = isinstance(error, OutOfMemory)
        in_step = {chunk.seq_id for chunk in step.chunks}
        requests = [s.request.request_id for s in self.scheduler.running if s.seq_id in in_step]
        log.error(
            "a step of %d tokens failed (%s); %d sequences start over: %s",
            step.num_tokens,
            type(error).__name__,
            len(requests),
            ", ".join(requests[:8]),
            exc_info=None if out_of_memory else error,
        )
        if out_of_memory:
            self._stats.out_of_memory += 1
            message = "the device has not enough memory for this request"
        else:
            self._stats.step_failures += 1
            message = "the engine failed on this request"
            self._watchdog.step_failed(now=now)
        self._close(self.scheduler.step_failed(step, message, now=now, out_of_memory=out_of_memory))

    def _start_over(self, error: Exception) -> bool:
        """End what is alive and begin with an empty scheduler; False: the loop fails too often."""
        alive = self._outputs.all()
        log.error("the step loop failed; %d sequences end", len(alive), exc_info=error)
        self._stats.restarts += 1
        restarts = self._watchdog.may_restart(now=time.monotonic())
        message = "had to start over; please try again" if restarts else "stopped unexpectedly"
        end = End(FinishReason.ERROR, error=f"the engine {message}")
        for sequence in alive:
            if not sequence.finished:
                sequence.finish(self._outputs.flush(sequence, end))
            self._close([sequence])
        self.scheduler = self._new_scheduler()
        pins, caps = self._pins
        self.scheduler.prefix_loader.set_pins(pins, caps=caps)
        self.publish()
        return restarts

    # -- what other threads see ----

    def publish(self) -> None:
        """Publish what changed since the last time, and answer requests for the figures."""
        scheduler, preloads = self.scheduler, self.scheduler.prefix_loader.preloads
        residency, host = scheduler.memory.residency, scheduler.memory.host
        version = scheduler, residency.num_changes, host.num_changes, preloads.num_changes
        if version != self._published:
            self._published = version
            self.tiers, self.preloads = tiers_of(scheduler), preloads.by_tenant()
        self._queue_limiter.rate = self._stats.rate
        is_queued = scheduler.waiting.num_sequences > 0
        if is_queued or self._queue_published:
            self._queue_limiter.publish(scheduler.waiting)
            self._queue_published = is_queued
        if self._stats_requests:
            self._answer_stats()
        with self._wake:
            self._busy = is_queued or bool(scheduler.running)

    def _answer_stats(self) -> None:
        self._build_stats(time.monotonic())
        while self._stats_requests:
            self._stats_requests.popleft().set_result(self._snapshot)

    def answer_state(self, answer: Future[dict[str, Any]]) -> None:
        """Set ``debug_state`` as the result; a failure to look does not end what runs."""
        try:
            answer.set_result(debug_state(self.scheduler, now=time.monotonic()))
        except Exception as error:  # noqa: BLE001 - raised where the result is read
            answer.set_exception(error)

    def _build_stats(self, now: float) -> None:
        self._snapshot_at = now
        self._snapshot = self._stats.snapshot(self.scheduler, self.tiers)

    # -- posted by other threads ----

    def add(self, request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        """Queue the sequences of a request."""
        now = time.monotonic()
        seed = request.sampling.seed
        base_seed = secrets.randbits(63) if seed is None else seed
        self._stats.prompt_tokens += len(request.prompt) * request.n
        sequences = sequences_of(request, first_id=self._next_id, seed=base_seed)
        self._next_id += request.n
        self._outputs.open(sequences, on_event)
        self._queue_limiter.entered(request)
        for sequence in sequences:
            self._close(self.scheduler.add(sequence, now=now))

    def preload(self, handle: PrefixHandle, cap: int | None) -> None:
        """Add a preload, and publish how many there are."""
        preloads = self.scheduler.prefix_loader.preloads
        preloads.add(handle, cap=cap, now=time.monotonic())
        self.preloads = preloads.by_tenant()

    def set_pins(self, pins: tuple[PrefixHandle, ...], caps: Mapping[str, int] | None) -> None:
        """Pin these prefixes and no others, also after the loop starts over."""
        self._pins = pins, caps
        self.scheduler.prefix_loader.set_pins(pins, caps=caps)

    def abort(self, request_id: str) -> None:
        """End the sequences of a request."""
        self.end(self._outputs.of(request_id), FinishReason.ABORT)

    def end(self, sequences: Iterable[Sequence], reason: FinishReason) -> None:
        """End and close sequences."""
        for sequence in sequences:
            if not sequence.finished:
                self.scheduler.end(sequence, End(reason))
            self._close([sequence])

    def _close(self, ended: Iterable[Sequence]) -> None:
        for sequence in ended:
            assert sequence.end is not None
            reason = sequence.end.reason
            is_shed = reason is FinishReason.SHED
            retry_after = self._queue_limiter.retry_after if is_shed else None
            self._outputs.close(sequence, retry_after=retry_after)
            self._stats.finished[reason.value] += 1

    # -- fetches ----

    def _fetch(self, scheduler: Scheduler, key: PrefixKey) -> None:
        """On a fetch thread: load a prefix from the store, and post the result."""
        result: StagedPrefix | PrefixUnavailable
        try:
            result = self._source.fetch(key)
        except PrefixUnavailable as error:
            result = error
        except Exception:
            log.exception("prefix %s failed to load", key.digest)
            result = PrefixUnavailable("the prefix failed to load")
        self.post(lambda: self._fetched(scheduler, key, result))

    def _fetched(
        self, scheduler: Scheduler, key: PrefixKey, result: StagedPrefix | PrefixUnavailable
    ) -> None:
        if scheduler is not self.scheduler:
            return  # the loop has started over since, and may have fetched the prefix again
        now = time.monotonic()
        if isinstance(result, PrefixUnavailable):
            self._close(scheduler.prefix_failed(key, str(result), code=result.code, now=now))
        else:
            self._close(scheduler.prefix_staged(key, result, now=now))
