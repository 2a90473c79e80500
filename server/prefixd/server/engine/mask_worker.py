"""Masks of constrained sequences: computed on threads of their own while a forward pass runs.

::

    engine    | take tokens | send text, update, plan | submit, run the pass ........ | join, sample
    threads                 | advance, compute masks ......................|

A mask depends on a sequence's tokens alone, so it is begun as soon as these are known, and joined
just before its row is sampled. A tenant whose masks were slow has its sequences in no step before
their masks are there: free rows and other tenants do not wait for them. So it is for all of the
background class; its masks come after those of others, and slow ones hold only its own.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from prefixd.server.engine.constraint import CONSTRAINT_FAILED, ConstraintFailed, Progress
from prefixd.server.engine.request import FinishReason
from prefixd.server.engine.sequence import End, Sequence
from prefixd.server.engine.step import Sampled, Step

log = logging.getLogger(__name__)

SLOW_S = 0.003
"""CPU time of a mask from which its tenant's sequences wait for theirs outside of steps."""

NUM_HELD = 256
"""Masks of a tenant that are waited for that way after a slow one."""

_STOP = 2

_Owner = tuple[str, bool]
"""A tenant, and whether the sequence is of the background class."""


def _owner(sequence: Sequence) -> _Owner:
    return sequence.tenant, sequence.background


@dataclass(eq=False, slots=True)
class _Row:
    """The constraint of one sequence, and its mask for the next token. ``mask`` and ``end`` are
    valid when ``done`` is set; both are None before the first. The first mask is computed when it
    is begun, on a thread, like all."""

    sequence: Sequence
    progress: Progress | None = None
    num_tokens: int = 0
    mask: bytes | None = None
    end: End | None = None
    done: threading.Event = field(default_factory=threading.Event)


class MaskWorker:
    """Computes masks. All methods are for the engine's thread."""

    def __init__(
        self,
        *,
        wake: Callable[[], object],
        threads: int = 1,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """``wake`` is called on a thread of the worker when a mask is there that a step waits for;
        ``clock`` measures a mask, in seconds."""
        self._wake, self._clock, self._num_threads = wake, clock, threads
        self._rows: dict[int, _Row] = {}
        self._held: dict[_Owner, int] = {}  # masks until it is trusted again
        self._jobs: queue.PriorityQueue[tuple[int, int, _Row | None, Items[int]]]
        self._jobs = queue.PriorityQueue()
        self._order = itertools.count()
        self._threads: list[threading.Thread] = []
        self._ended: dict[int, End] = {}
        self._lock = threading.Lock()  # of the figures
        self._num_masks = 0
        self._seconds = 0.0

    # -- of one sequence ----

    def open(self, sequence: Sequence) -> None:
        """Begin the first mask of a new sequence, if it has a constraint."""
        if sequence.request.constraint is not None:
            row = self._rows[sequence.seq_id] = _Row(sequence)
            self._begin(row, ())

    def advance(self, step: Step, sampled: Mapping[int, Items[Sampled]]) -> None:
        """Begin the masks after the tokens that the masked rows of ``step`` have got."""
        for seq_id in step.masked:
            row, tokens = self._rows.get(seq_id), sampled.get(seq_id, ())
            if row is None or not tokens or not all(token.finite for token in tokens):
                continue
            ids = [token.token_id for token in tokens]
            if not row.sequence.request.stop.token_ids.intersection(ids):  # it ends with one
                self._begin(row, ids)

    def holds(self, sequence: Sequence) -> bool:
        """Whether the sequence is to be in no step now: its tenant's masks are slow, or it is of
        the background class, and it has none yet."""
        if not sequence.background and _owner(sequence) not in self._held:
            return False
        row = self._rows.get(sequence.seq_id)
        return row is not None and (sequence.num_pending > 0 or not row.done.is_set())

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._rows.pop(sequence.seq_id, None)

    # -- of one step ----

    def join(self, step: Step) -> Callable[[], Mapping[int, bytes]]:
        """A call that waits for the masks of ``step`` and returns them, by sequence id. Sequences
        that end instead of getting one are in ``take_ended`` then."""
        rows = [self._rows[seq_id] for seq_id in step.masked if seq_id in self._rows]

        def wait() -> Mapping[int, bytes]:
            masks = {}
            for row in rows:
                row.done.wait()
                if row.mask is not None:
                    masks[row.sequence.seq_id] = row.mask
                elif row.end is not None:
                    self._ended[row.sequence.seq_id] = row.end
            return masks

        return wait

    def take_ended(self) -> Iterable[tuple[Sequence, End]]:
        """Sequences that are to end, and how; each once."""
        ended, self._ended = self._ended, {}
        rows = self._rows
        return [(rows[seq_id].sequence, end) for seq_id, end in ended.items() if seq_id in rows]

    def counts(self) -> tuple[int, float]:
        """Masks computed, and the CPU time they took."""
        with self._lock:
            return self._num_masks, self._seconds

    # -- threads ----

    def start_over(self) -> None:
        """Forget all sequences."""
        self._rows.clear()
        self._ended.clear()

    def stop(self) -> None:
        """End the threads, after the masks that they compute."""
        for _ in self._threads:
            self._jobs.put((_STOP, next(self._order), None, ()))
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _begin(self, row: _Row, token_ids: Items[int]) -> None:
        row.done.clear()
        row.num_tokens += len(token_ids)
        is_held = row.sequence.background or _owner(row.sequence) in self._held
        if len(self._threads) < min(self._num_threads, len(self._rows)):
            thread = threading.Thread(
                target=self._run, name=f"masks-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        self._jobs.put((int(is_held), next(self._order), row, token_ids))

    def _run(self) -> None:
        while True:
            _, _, row, token_ids = self._jobs.get()
            if row is None:
                return
            began = self._clock()
            row.mask, row.end = _compute(row, token_ids)
            is_held = self._count(_owner(row.sequence), self._clock() - began)
            row.done.set()
            if is_held or row.sequence.background:
                self._wake()

    def _count(self, owner: _Owner, seconds: float) -> bool:
        """Take in how long a mask took. Returns whether steps wait for those of its owner."""
        with self._lock:
            self._num_masks += 1
            self._seconds += seconds
            held = self._held.get(owner, 0)
            if seconds > SLOW_S:
                self._held[owner] = NUM_HELD
            elif held > 1:
                self._held[owner] = held - 1
            elif held:
                del self._held[owner]
        return bool(held) or seconds > SLOW_S


def _compute(row: _Row, token_ids: Items[int]) -> tuple[bytes | None, End | None]:
    """The next mask of a sequence, or how it ends instead."""
    request = row.sequence.request
    stop, constraint = request.stop, request.constraint
    assert constraint is not None
    try:
        if row.progress is None:
            row.progress = constraint.start(stop.token_ids)
        row.progress.advance(token_ids)
        is_early = row.num_tokens < stop.min_tokens
        mask = row.progress.allowed(stop.token_ids if is_early else ())
    except ConstraintFailed as failure:
        log.warning("the constraint of request %s: %s", request.request_id, failure)
        return None, End(FinishReason.ERROR, error=str(failure), error_code=CONSTRAINT_FAILED)
    except BaseException:  # a panic in Rust is no Exception, and the engine waits for this thread
        log.exception("the constraint of request %s failed", request.request_id)
        return None, End(FinishReason.ERROR, error="the engine failed on this request")
    return (None, End(FinishReason.STOP)) if mask is None else (mask, None)
