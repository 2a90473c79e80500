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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from server.engine.config import SchedulerConfig
from server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixKey,
    TokenEvent,
    TokenLogprob,
)
from server.engine.scheduler import Progress, Scheduler
from server.engine.sequence import Sequence
from server.engine.stats import EngineStats, StatsKeeper
from server.engine.step import (
    Detokenizer,
    ModelRunner,
    PrefixSource,
    PrefixUnavailable,
    Sampled,
    StagedPrefix,
    Step,
)
from server.engine.stopping import StopStrings

log = logging.getLogger(__name__)


def seeded_uniform(seed: int, index: int) -> float:
    """The draw in [0, 1) for output ``index`` under ``seed``: the same whatever else is in the
    batch, after a preemption and on any device."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


@dataclass(slots=True)
class _Reply:
    """The way back from one sequence to its caller: text is made final here."""

    on_event: Callable[[Event], None]
    detokenizer: Detokenizer
    stop: StopStrings


class Engine:
    """Runs requests. ``submit``, ``abort`` and ``stats`` may be called from any thread."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        runner: ModelRunner,
        source: PrefixSource,
        detokenizer: Callable[[], Detokenizer],
        fetch_threads: int = 2,
    ) -> None:
        """``detokenizer`` makes a fresh one for each sequence."""
        self.config = config
        self.scheduler = Scheduler(config, uniform=seeded_uniform)
        self._runner = runner
        self._source = source
        self._detokenizer = detokenizer
        self._fetchers = ThreadPoolExecutor(fetch_threads, thread_name_prefix="prefix-fetch")
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._next_id = 0
        self._sequences: dict[str, list[Sequence]] = {}
        self._replies: dict[int, _Reply] = {}
        self._stats = StatsKeeper()
        self._snapshot = self._stats.snapshot(self.scheduler)

    # -- for any thread ----

    def submit(self, request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request. ``on_event`` is called on the engine's thread and must not block.

        An engine that has stopped answers at once, on the caller's thread, with an abort.
        """
        if not self._post(lambda: self._add(request, on_event)):
            for index in range(request.n):
                on_event(FinishEvent(index, FinishReason.ABORT, completion_tokens=0))

    def abort(self, request_id: str) -> None:
        """End a request's sequences now and free everything they hold; unknown ids are ignored."""
        self._post(lambda: self._abort(request_id))

    def stats(self) -> EngineStats:
        """The figures as of the end of the last step."""
        return self._snapshot

    @property
    def ready(self) -> bool:
        """Whether the step loop is alive."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the step loop."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step in flight; sequences still alive are aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._fetchers.shutdown(wait=True, cancel_futures=True)

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
        reason, error = FinishReason.ABORT, None
        try:
            busy = False
            while self._take_inbox(patience=0.0 if busy else None):
                step = self.scheduler.schedule()
                for key in step.fetches:
                    self._fetchers.submit(self._fetch, key)
                busy = step.has_work
                if busy:
                    self._run(step)
                self._snapshot = self._stats.snapshot(self.scheduler)
        except Exception:
            log.exception("the step loop died")
            reason, error = FinishReason.ERROR, "the engine stopped unexpectedly"
        with self._wake:
            self._stopping = self._closed = True
        self._take_inbox(patience=0.0)
        self._end_all(reason, error)
        self._snapshot = self._stats.snapshot(self.scheduler)

    def _take_inbox(self, *, patience: float | None) -> bool:
        """Do what was posted, after waiting up to ``patience`` seconds for something to be
        (None: for ever). False: time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._stopping, timeout=patience)
            posted, stopping = tuple(self._inbox), self._stopping
            self._inbox.clear()
        for act in posted:
            act()
        return not stopping

    def _run(self, step: Step) -> None:
        started = time.perf_counter()
        try:
            output = self._runner.run(step)
        except Exception:
            log.exception("a step of %d tokens failed; its sequences end", step.num_tokens)
            self._stats.step_failures += 1
            for sequence in self.scheduler.step_failed(step, "the engine failed on this step"):
                self._finished(sequence)
            return
        progress = self.scheduler.update(step, output)
        self._stats.step(step, time.perf_counter() - started, progress)
        for item in progress:
            self._report(item)

    # -- messages ----

    def _add(self, request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        seed = request.sampling.seed
        base_seed = secrets.randbits(63) if seed is None else seed
        self._sequences[request.request_id] = []
        self._stats.prompt_tokens += len(request.prompt) * request.n
        for index in range(request.n):
            sequence = Sequence(
                seq_id=self._next_id,
                request=request,
                index=index,
                seed=base_seed + index,
                tokens=list(request.prompt),
            )
            self._next_id += 1
            stop = StopStrings(request.stop.strings, include=request.stop.include_stop_string)
            self._replies[sequence.seq_id] = _Reply(on_event, self._detokenizer(), stop)
            self._sequences[request.request_id].append(sequence)
            self.scheduler.add(sequence)

    def _abort(self, request_id: str) -> None:
        for sequence in tuple(self._sequences.get(request_id, ())):
            self.scheduler.end(sequence, FinishReason.ABORT)
            self._finished(sequence)

    def _fetch(self, key: PrefixKey) -> None:
        """On a fetch thread: bring one prefix and post what came of it."""
        try:
            payload = self._source.fetch(key)
        except PrefixUnavailable as error:
            message = str(error)
            self._post(lambda: self._fetch_failed(key, message))
        except Exception:
            log.exception("prefix %s could not be loaded", key.digest)
            self._post(lambda: self._fetch_failed(key, "the prefix could not be loaded"))
        else:
            self._post(lambda: self._fetched(key, payload))

    def _fetched(self, key: PrefixKey, payload: StagedPrefix) -> None:
        for sequence in self.scheduler.prefix_staged(key, payload):
            self._finished(sequence)

    def _fetch_failed(self, key: PrefixKey, message: str) -> None:
        for sequence in self.scheduler.prefix_failed(key, message):
            self._finished(sequence)

    # -- replies ----

    def _report(self, item: Progress) -> None:
        sequence, sampled = item.sequence, item.sampled
        reply = self._replies[sequence.seq_id]
        if sampled is not None and sequence.reason is not FinishReason.STOP:
            self._tell(reply, sequence, sampled)
        if sequence.finished:
            self._finished(sequence)

    def _tell(self, reply: _Reply, sequence: Sequence, sampled: Sampled) -> None:
        """Pass a token on: text that is final goes out, a stop string ends the sequence."""
        text = reply.detokenizer.push(sampled.token_id)
        stop = None
        if sequence.num_output > sequence.request.stop.min_tokens:
            text, stop = reply.stop.push(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob),)
        event = TokenEvent(
            index=sequence.index,
            text=text,
            token_ids=(sampled.token_id,),
            logprobs=logprobs,
            top_logprobs=(sampled.top_logprobs,) if logprobs else (),
        )
        self._send(reply, event)
        if stop is not None:
            if sequence.finished:
                sequence.reason, sequence.stop = FinishReason.STOP, stop
            else:
                self.scheduler.end(sequence, FinishReason.STOP, stop=stop)

    def _finished(self, sequence: Sequence) -> None:
        """Send the last of the text and the end, and forget the sequence."""
        assert sequence.reason is not None
        reply = self._replies.pop(sequence.seq_id)
        siblings = self._sequences[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.request_id]
        self._stats.finished[sequence.reason.value] += 1
        if not isinstance(sequence.stop, str):
            self._flush(reply, sequence)
        self._send(
            reply,
            FinishEvent(
                index=sequence.index,
                reason=sequence.reason,
                completion_tokens=sequence.num_output,
                stop=sequence.stop,
                error=sequence.error,
            ),
        )

    def _flush(self, reply: _Reply, sequence: Sequence) -> None:
        text, stop = reply.stop.push(reply.detokenizer.flush())
        if stop is not None:
            sequence.reason, sequence.stop = FinishReason.STOP, stop
        else:
            text += reply.stop.flush()
        if text:
            self._send(reply, TokenEvent(index=sequence.index, text=text, token_ids=()))

    def _send(self, reply: _Reply, event: Event) -> None:
        try:
            reply.on_event(event)
        except Exception:
            log.exception("a caller's event handler failed; the engine goes on")

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        for sequences in tuple(self._sequences.values()):
            for sequence in tuple(sequences):
                if not sequence.finished:
                    self.scheduler.end(sequence, reason, error=error)
                self._finished(sequence)
