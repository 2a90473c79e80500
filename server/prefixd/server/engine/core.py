"""What runs on the engine's thread: one turn plans a step, submits it and reports a step's output.

::

    expire ──> schedule ──> fetch ──> submit ──> deliver ──> collect ──> push text ──> update ──┐
                          (threads)  (device)  (callers)   (device)       publish <── close <──┘

The step that is collected is the one submitted; with a runner of ``depth`` 1 it is the one before.

The scheduler and the runner are touched by this thread alone, so neither needs a lock. What other
threads may read is ``published``.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.failures import Failures
from prefixd.server.engine.fetcher import Fetcher, FetchResult
from prefixd.server.engine.mask_worker import MaskWorker
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.pipeline import Pipeline, StepFailed
from prefixd.server.engine.prefix_source import PrefixSource, PrefixUnavailable
from prefixd.server.engine.published import PublishedState
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishReason,
    PrefixHandle,
    PrefixKey,
)
from prefixd.server.engine.runner import ModelRunner, OutOfMemory
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import End, Sequence, seeded_uniform, sequences_of
from prefixd.server.engine.stats import EngineStats, StatsCounters
from prefixd.server.engine.step import Step

log = logging.getLogger(__name__)

_IDLE_POLL_S = 0.05
"""How often to try again when sequences wait and no step can be run."""

_MAX_STATS_AGE_S = 1.0
_MAX_RESTARTS, _RESTARTS_WITHIN_S = 5, 60.0


class EngineCore:
    """Owns the scheduler. Called by the engine's thread, except where a comment says otherwise.

    Any thread may read ``published``, ``failures`` and ``turn_began``: in seconds of
    ``time.monotonic``, None between two turns.
    """

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        runner: ModelRunner,
        source: PrefixSource,
        outputs: OutputProcessor,
        queue_limiter: QueueLimiter,
        namespace: str,
        fetch_threads: int,
        post: Callable[[Callable[[], None]], bool],
    ) -> None:
        """``post`` has a function called on the engine's thread."""
        self._config = config
        self._outputs = outputs
        self._queue_limiter = queue_limiter
        self._namespace = namespace
        self._post = post
        self._fetcher = Fetcher(source, threads=fetch_threads)
        self._masks = MaskWorker(wake=lambda: post(lambda: None))
        self._next_id = 0
        self._pins: tuple[tuple[PrefixHandle, ...], Mapping[str, int] | None] = (), None
        self._restarts: deque[float] = deque(maxlen=_MAX_RESTARTS)
        self._pipeline = Pipeline(runner)
        self._counters = StatsCounters()
        self.scheduler = self._new_scheduler()
        self.turn_began: float | None = None
        self.failures = Failures(self._pipeline, num_blocks=1 + config.state_blocks)
        self.published = PublishedState(
            self.scheduler, counters=self._counters, queue_limiter=queue_limiter
        )

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self._config,
            uniform=seeded_uniform,
            flush=self._outputs.flush,
            holds=self._masks.holds,
            namespace=self._namespace,
        )

    # -- turns ----

    def turn(self) -> bool:
        """Run one step. False: there was none to run, and none is in flight."""
        now = self.turn_began = time.monotonic()
        if self.scheduler.deadlines.next_at <= now:
            self._close(self.scheduler.expire(now=now))
        step = self.scheduler.schedule(now=now)
        for key in step.fetches:
            self._fetch(self.scheduler, key)
        if step.has_work:
            self._submit(step, now)
        # Of the step before. The thread that wakes shares the interpreter with this one, which
        # leaves it for the device now.
        self._outputs.deliver()
        in_flight = len(self._pipeline)
        if in_flight:
            self._collect(step)
            if self.scheduler.idle:
                self._outputs.deliver()
        self.published.update(self.scheduler)
        self.turn_began = None
        if step.has_work or in_flight:
            return True
        self._pipeline.pause()
        return False

    def idle_timeout(self) -> float | None:
        """Seconds until the next turn when there was no step to run; None: nothing waits."""
        if self.scheduler.idle and not self.scheduler.prefix_loader.preloads.pending:
            return None
        until_expiry = max(0.0, self.scheduler.deadlines.next_at - time.monotonic())
        return min(_IDLE_POLL_S, until_expiry)

    def _submit(self, step: Step, now: float) -> None:
        if now - self.published.stats_built > _MAX_STATS_AGE_S:
            self.build_stats()  # to have recent figures if this step does not end
        try:
            self._pipeline.submit(step)
        except StepFailed as failure:  # a failed step ends no loop
            # What is in flight comes first: it may have failed too, and this step with it.
            if failure.alone or self._collect_next():
                self._step_failed(failure)

    def _collect(self, step: Step) -> None:
        """Collect what was in flight before ``step``, and ``step`` too, unless the next one is to
        be planned without its output."""
        pipeline = self._pipeline
        if len(pipeline) > 1 or not pipeline.holds(step):
            self._collect_next()
        if not len(pipeline):
            return  # ``step`` had no work, or was discarded
        if pipeline.needs_masks:
            self._complete(step)
        if not pipeline.runner.depth or self.scheduler.recovery.proving:
            self._collect_next()

    def _complete(self, step: Step) -> None:
        """Let the masked rows of ``step`` be sampled."""
        self._pipeline.complete(self._masks.join(step))
        self._end_unmasked()

    def _end_unmasked(self) -> None:
        """End the sequences for which there was no mask: their output is complete, or failed."""
        for sequence, end in self._masks.take_ended():
            if not sequence.finished:
                self.scheduler.end(sequence, end)
            self._close([sequence])

    def _collect_next(self) -> bool:
        """Collect the oldest step in flight, and report its output. False: it failed, and nothing
        is in flight any more."""
        try:
            step, output, seconds, period = self._pipeline.collect()
        except StepFailed as failure:  # it ends no loop
            self._step_failed(failure)
            return False
        self.failures.count = 0
        self.scheduler.observe(step, seconds, period_s=period)
        if step.masked:
            self._end_unmasked()
            self._masks.advance(step, output.sampled)
            self._counters.masks, self._counters.mask_seconds = self._masks.counts()
        self._outputs.push_scores(step.chunks, output)
        ends = self._outputs.push(output.sampled)
        self._counters.step(step, seconds, output)
        ended = self.scheduler.update(step, output, ends)
        if ended:
            self._close(ended)
        return True

    def _step_failed(self, failure: StepFailed) -> None:
        """Log it, and let the scheduler go on with the parts that may succeed."""
        now, step, error = time.monotonic(), failure.step, failure.error
        out_of_memory = isinstance(error, OutOfMemory)
        steps = self.scheduler.in_flight
        alone = failure.alone and len(steps) == 1
        in_steps = {chunk.seq_id for each in steps for chunk in each.chunks}
        living = self.scheduler.sequences()
        requests = [s.request.request_id for s in living if s.seq_id in in_steps]
        log.error(
            "a step of %d tokens failed (%s); %d sequences start over: %s",
            step.num_tokens,
            type(error).__name__,
            len(requests),
            ", ".join(requests[:8]),
            exc_info=None if out_of_memory else error,
        )
        if out_of_memory:
            self._counters.out_of_memory += 1
            message = "the device has not enough memory for this request"
        else:
            self._counters.step_failures += 1
            message = "the engine failed on this request"
        ended = self.scheduler.step_failed(
            step, message, now=now, out_of_memory=out_of_memory, alone=alone
        )
        # The parts of a larger step run alone first, so that one tenant's request is known by then.
        if alone and not out_of_memory and step.is_smallest:
            self.failures.explain(self.scheduler.memory.pool, now=now)
        self._close(ended)

    def start_over(self, error: Exception) -> bool:
        """After an exception in a turn: end what is alive and begin with an empty scheduler. False:
        that has happened too often."""
        alive, now = self._outputs.all(), time.monotonic()
        log.error("the step loop failed; %d sequences end", len(alive), exc_info=error)
        recent = [moment for moment in self._restarts if now - moment < _RESTARTS_WITHIN_S]
        self._restarts.append(now)
        self._counters.restarts += 1
        self._pipeline.discard()
        self.turn_began = None
        restarts = len(recent) < _MAX_RESTARTS
        message = "had to start over; please try again" if restarts else "stopped unexpectedly"
        end = End(FinishReason.ERROR, error=f"the engine {message}")
        for sequence in alive:
            if not sequence.finished:
                sequence.finish(self._outputs.flush(sequence, end))
            self._close([sequence])
        self._outputs.deliver()
        self.scheduler = self._new_scheduler()
        self._masks.start_over()
        self.published.clear()
        pins, caps = self._pins
        self.scheduler.prefix_loader.set_pins(pins, caps=caps)
        self.published.update(self.scheduler)
        return restarts

    def shut_down(self) -> None:
        """Abort what is alive."""
        self._pipeline.discard()
        self._end(self._outputs.all(), FinishReason.ABORT)
        self._outputs.deliver()
        self.published.update(self.scheduler)

    def stop_threads(self) -> None:
        """End the threads of fetches and masks, after those in progress. On the thread that stops
        the engine."""
        self._fetcher.stop()
        self._masks.stop()

    def build_stats(self) -> EngineStats:
        """Build and publish the figures of this moment."""
        return self.published.build_stats(self.scheduler, now=time.monotonic())

    # -- requests of other threads, called between two turns ----

    def add(
        self,
        request: AdmittedRequest,
        on_event: Callable[[Event], None],
        deliver: Callable[[], None] | None = None,
    ) -> None:
        """Queue the sequences of a request; ``deliver`` as for ``Engine.submit``."""
        now = time.monotonic()
        seed = request.sampling.seed
        base_seed = secrets.randbits(63) if seed is None else seed
        self._counters.prompt_tokens += request.num_prompt_tokens * request.n
        sequences = sequences_of(request, first_id=self._next_id, seed=base_seed)
        self._next_id += request.n * request.num_rows
        self._outputs.open(sequences, on_event, deliver)
        self._queue_limiter.entered(request)
        for sequence in sequences:
            self._masks.open(sequence)
            self._close(self.scheduler.add(sequence, now=now))

    def abort(self, request_id: str) -> None:
        """End the sequences of a request."""
        self._end(self._outputs.of(request_id), FinishReason.ABORT)

    def preload(self, handle: PrefixHandle, cap: int | None) -> None:
        """Add a preload, and publish how many there are."""
        preloads = self.scheduler.prefix_loader.preloads
        preloads.add(handle, cap=cap, now=time.monotonic())
        self.published.update_preloads(preloads)

    def set_pins(self, pins: tuple[PrefixHandle, ...], caps: Mapping[str, int] | None) -> None:
        """Pin these prefixes and no others, also after the engine starts over."""
        self._pins = pins, caps
        self.scheduler.prefix_loader.set_pins(pins, caps=caps)

    # -- ends ----

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason) -> None:
        for sequence in sequences:
            if not sequence.finished:
                self.scheduler.end(sequence, End(reason))
            self._close([sequence])

    def _close(self, ended: Iterable[Sequence]) -> None:
        """Send the last event of finished sequences, and count them."""
        for sequence in ended:
            assert sequence.end is not None
            reason = sequence.end.reason
            is_shed = reason is FinishReason.SHED
            retry_after = self._queue_limiter.retry_after if is_shed else None
            self._outputs.close(sequence, retry_after=retry_after)
            self._masks.close(sequence)
            self._counters.finished[reason.value] += 1

    # -- fetches ----

    def forget_failure(self, key: PrefixKey) -> None:
        """Let a prefix that failed be fetched again at once."""
        self.scheduler.prefix_loader.forget_failure(key)

    def _fetch(self, scheduler: Scheduler, key: PrefixKey) -> None:
        def fetched(result: FetchResult) -> None:
            self._post(lambda: self._fetched(scheduler, key, result))

        self._fetcher.fetch(key, fetched)

    def _fetched(self, scheduler: Scheduler, key: PrefixKey, result: FetchResult) -> None:
        if scheduler is not self.scheduler:
            return  # the engine has started over since, and may have fetched the prefix again
        now = time.monotonic()
        if isinstance(result, PrefixUnavailable):
            self._close(scheduler.prefix_failed(key, str(result), code=result.code, now=now))
        else:
            self._close(scheduler.prefix_staged(key, result, now=now))
