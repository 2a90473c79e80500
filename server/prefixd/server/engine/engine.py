"""The engine: one thread that runs schedule, run, update, for ever; the one file with a loop.

Others talk to it through an inbox. The scheduler and the runner are touched by the engine's own
thread alone, so neither needs a lock.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.debug_state import debug_state
from prefixd.server.engine.fetchers import Fetchers
from prefixd.server.engine.output_processor import OutputProcessor
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
from prefixd.server.engine.scheduler import Progress, Scheduler
from prefixd.server.engine.sequence import Sequence, sequences_of
from prefixd.server.engine.stats import EngineStats, StatsKeeper
from prefixd.server.engine.step import (
    Detokenizer,
    ModelRunner,
    OutOfMemory,
    PrefixSource,
    PrefixUnavailable,
    StagedPrefix,
    Step,
)
from prefixd.server.engine.watchdog import Watchdog

log = logging.getLogger(__name__)

_IDLE_POLL_S = 0.05
"""How often the loop looks again at what waits when no step can be run."""


def seeded_uniform(seed: int, index: int) -> float:
    """The draw in [0, 1) for output ``index`` under ``seed``: the same whatever else is in the
    batch, after a preemption and on any device."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


class Engine:
    """Runs requests. All that is public may be called from any thread.

    The scheduler is the engine's thread's own: it is public for tests, to look at once the engine
    has stopped.
    """

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
        """``detokenizer`` makes a fresh one for each sequence. ``namespace`` names what KV depends
        on beside tokens: fingerprint and dtype. A step that takes longer than ``watchdog_s``
        seconds makes the engine not ready."""
        self.config = config
        self._namespace = namespace
        self.scheduler = self._new_scheduler()
        self._runner = runner
        self._fetchers = Fetchers(source, num_threads=fetch_threads)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._alive = False
        self._next_id = 0
        self._pins: tuple[tuple[PrefixHandle, ...], Mapping[str, int] | None] = (), None
        self._replies = OutputProcessor(detokenizer)
        self._queue_limiter = QueueLimiter(config)
        self._watchdog = Watchdog(watchdog_s=watchdog_s)
        self._stats = StatsKeeper()
        self._snapshot = self._stats.snapshot(self.scheduler)

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.config, uniform=seeded_uniform, namespace=self._namespace)

    # -- for any thread ----

    def submit(self, request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request. ``on_event`` is called on the engine's thread and must not block.

        Raises QueueFull. An engine that has stopped answers at once, on the caller's thread, with
        an abort.
        """
        self._queue_limiter.enter(request)
        if not self._post(lambda: self._add(request, on_event)):
            for index in range(request.n):
                on_event(FinishEvent(index, FinishReason.ABORT, completion_tokens=0))

    def check_room(self, tenant: str, *, weight: float = 1.0) -> None:
        """Raise QueueFull when ``submit`` would, whatever ``tenant`` asks for: worth asking before
        the work of admission."""
        self._queue_limiter.check(tenant, weight=weight)

    def abort(self, request_id: str) -> None:
        """End a request's sequences now and free everything they hold; unknown ids are ignored."""
        self._post(lambda: self._end_each(self._replies.of(request_id), FinishReason.ABORT))

    def warm(self, handle: PrefixHandle, *, max_resident_tokens: int | None = None) -> None:
        """Bring a prefix into the pool when there is room for a while, under its tenant's cap.
        Raises QueueFull when too many are being warmed and nobody has more of them."""
        if self.scheduler.prefix_loader.preloads.full_for(handle.key.tenant):
            raise QueueFull("too many prefixes are being warmed", retry_after=1.0)
        cap = max_resident_tokens
        self._post(
            lambda: self.scheduler.prefix_loader.preloads.add(handle, cap=cap, now=time.monotonic())
        )

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Bring these prefixes in and keep them, and no others: they leave only where a request
        could never run otherwise. ``caps``: virtual tokens that tenants may have in the pool."""
        pins = tuple(handles)

        def pin() -> None:
            self._pins = pins, caps
            self.scheduler.prefix_loader.set_pins(pins, caps=caps)

        self._post(pin)

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Versions that were deleted or replaced: they leave when their last sequence does."""
        retired = tuple(keys)
        self._post(lambda: self.scheduler.prefix_loader.retire(retired))

    def tier(self, key: PrefixKey) -> str | None:
        """How far a prefix has come: fetching, staged, compiling, resident, or in host memory."""
        return self._snapshot.tiers.get(key)

    def stats(self) -> EngineStats:
        """The figures as of the end of the last step."""
        return self._snapshot

    def state(self, *, timeout_s: float = 5.0) -> dict[str, Any]:
        """The scheduler's picture between two steps. Raises TimeoutError when no step ends."""
        answer: Future[dict[str, Any]] = Future()

        def answer_with_picture() -> None:
            try:
                answer.set_result(debug_state(self.scheduler, now=time.monotonic()))
            except Exception as error:  # noqa: BLE001 - who looks must not end what runs
                answer.set_exception(error)

        if not self._post(answer_with_picture):
            return debug_state(self.scheduler, now=time.monotonic())
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
        if self._thread is None or not self._thread.is_alive() or self._stopping:
            return "the engine is not running"
        return self._watchdog.trouble(now=time.monotonic())

    @property
    def idle(self) -> bool:
        """Whether no request is alive."""
        with self._wake:
            return not self._inbox and not self._alive

    def start(self) -> None:
        """Start the step loop."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Take no new request from now on; what is alive goes on."""
        self._queue_limiter.closed = "the server is shutting down"

    def stop(self) -> None:
        """End the loop after the step in flight; sequences still alive are aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._fetchers.stop()

    def _post(self, act: Callable[[], None]) -> bool:
        """Have ``act`` done on the engine's thread; False when nobody will come to do it."""
        with self._wake:
            if self._closed:
                return False
            self._inbox.append(act)
            self._wake.notify()
            return True

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
            self._take_inbox(patience=0.0)  # what came last is aborted, and nothing comes any more
            self._end_each(self._replies.all(), FinishReason.ABORT)
            self._publish()

    def _take_turns(self) -> None:
        """Until it is time to stop: take what was posted, run a step, tell what came of it."""
        busy = False
        while self._take_inbox(patience=0.0 if busy else self._patience()):
            now = time.monotonic()
            self._watchdog.turn_began(now=now)
            self._close_each(self.scheduler.expire(now=now))
            step = self.scheduler.schedule(now=now)
            for key in step.fetches:
                self._fetchers.fetch(key, partial(self._fetch_ended, self.scheduler))
            busy = step.has_work
            if busy:
                self._run(step)
            self._publish()
            self._watchdog.turn_ended()

    def _patience(self) -> float | None:
        """Seconds the loop may sleep when it has no step to run; None: until something comes."""
        expiry = self.scheduler.next_expiry
        if self.scheduler.idle and not self.scheduler.prefix_loader.preloads:
            return None
        until_expiry = _IDLE_POLL_S if expiry is None else max(0.0, expiry - time.monotonic())
        return min(_IDLE_POLL_S, until_expiry)

    def _take_inbox(self, *, patience: float | None) -> bool:
        """Do what was posted, after waiting up to ``patience`` seconds for something to be
        (None: for ever). False: time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._stopping, timeout=patience)
            posted, stopping = deque(self._inbox), self._stopping
            self._inbox.clear()
            self._alive = True  # until ``_publish`` has looked
        try:
            while posted:
                posted.popleft()()
        finally:
            # One that fails takes no other with it.
            with self._wake:
                self._inbox.extendleft(reversed(posted))
        return not stopping

    def _run(self, step: Step) -> None:
        started = time.perf_counter()
        try:
            output = self._runner.run(step)
        except Exception as error:  # noqa: BLE001 - logged there; nothing a pass does ends the loop
            self._step_failed(step, error)
            return
        self._watchdog.step_went_well()
        progress = self.scheduler.update(step, output)
        self._stats.step(step, time.perf_counter() - started, progress)
        for item in progress:
            self._report(item)

    def _step_failed(self, step: Step, error: Exception) -> None:
        """Say so, and go on with what can go on."""
        now = time.monotonic()
        out_of_memory = isinstance(error, OutOfMemory)
        carried = {chunk.seq_id for chunk in step.chunks}
        requests = [s.request.request_id for s in self.scheduler.running if s.seq_id in carried]
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
        self._close_each(
            self.scheduler.step_failed(step, message, now=now, out_of_memory=out_of_memory)
        )

    def _start_over(self, error: Exception) -> bool:
        """End what is alive, begin with an empty scheduler; False: there is no use in going on."""
        alive = self._replies.all()
        log.error("the step loop failed; %d sequences end", len(alive), exc_info=error)
        self._stats.restarts += 1
        goes_on = self._watchdog.may_restart(now=time.monotonic())
        message = "had to start over; please try again" if goes_on else "stopped unexpectedly"
        for sequence in alive:
            if not sequence.finished:
                sequence.finish(FinishReason.ERROR, error=f"the engine {message}")
            self._close_each([sequence])
        self.scheduler = self._new_scheduler()
        pins, caps = self._pins
        self.scheduler.prefix_loader.set_pins(pins, caps=caps)
        self._publish()
        return goes_on

    def _publish(self) -> None:
        """Let other threads see where things stand."""
        self._snapshot = self._stats.snapshot(self.scheduler)
        self._queue_limiter.publish(self.scheduler.waiting, rate=self._stats.rate)
        with self._wake:
            self._alive = not self.scheduler.idle

    # -- messages ----

    def _add(self, request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        now = time.monotonic()
        seed = request.sampling.seed
        base_seed = secrets.randbits(63) if seed is None else seed
        self._stats.prompt_tokens += len(request.prompt) * request.n
        sequences = sequences_of(request, first_id=self._next_id, seed=base_seed)
        self._next_id += request.n
        self._replies.open(sequences, on_event)
        self._queue_limiter.entered(request)
        for sequence in sequences:
            self._close_each(self.scheduler.add(sequence, now=now))

    def _fetch_ended(
        self, asker: Scheduler, key: PrefixKey, payload: StagedPrefix | PrefixUnavailable
    ) -> None:
        """On a fetch thread: pass on what came of it, but to nobody but who asked for it: since
        the loop started over another fetch may have brought the prefix."""

        def take_in() -> None:
            now = time.monotonic()
            if asker is not self.scheduler:
                return
            if isinstance(payload, PrefixUnavailable):
                failed = asker.prefix_failed(key, str(payload), code=payload.code, now=now)
                self._close_each(failed)
            else:
                self._close_each(asker.prefix_staged(key, payload, now=now))

        self._post(take_in)

    # -- replies ----

    def _report(self, item: Progress) -> None:
        sequence, sampled = item.sequence, item.sampled
        if sampled is not None and sequence.reason is not FinishReason.STOP:
            end = self._replies.token(sequence, sampled)
            if end is not None and not sequence.finished:
                self.scheduler.end(sequence, end.reason, stop=end.stop, error=end.error)
            elif end is not None:
                sequence.correct(end.reason, stop=end.stop, error=end.error)
        if sequence.finished:
            self._close_each([sequence])

    def _end_each(
        self, sequences: Iterable[Sequence], reason: FinishReason, error: str | None = None
    ) -> None:
        for sequence in sequences:
            if not sequence.finished:
                self.scheduler.end(sequence, reason, error=error)
            self._close_each([sequence])

    def _close_each(self, ended: Iterable[Sequence]) -> None:
        for sequence in ended:
            self._replies.close(sequence, retry_after=self._queue_limiter.retry_after)
            assert sequence.reason is not None
            self._stats.finished[sequence.reason.value] += 1
