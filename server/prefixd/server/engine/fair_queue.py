"""Fair queue of waiting sequences: a Virtual Token Counter per tenant.

"Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), algorithm 2, weighted: serve
the tenant with the lowest counter, charge it the tokens it gets divided by its weight, and lift a
tenant that returns from idleness to the level of the others, so that idleness earns no credit::

    counters after           a    b    c      weights 1; a turn costs 10; c is idle
    -----------------------------------------
    (start)                 20   20   10
    a is served             30   20   10
    b is served             30   30   10
    c queues a sequence     30   30   30      lifted to the lowest of those that wait, so it
                                              cannot use the 20 it did not take while idle

A tenant that waits and cannot be served, because its prefix is still loading, earns no credit
either: ``in_order`` passes over it, and the scheduler lifts it to the counter of the first tenant
that was served instead.

A queue per tenant is ordered by priority, then arrival, and indexed by prefix, so that one walk
visits what could run now at any depth, and of the rest only the front::

    tenant    sequences in order (the letter is the prefix; A is ready, depth 2, lookahead 4)
      t1      B1  A2  B3  A4  A5  B6       visited: B1 A2 B3 A4 B6    (A5 is beyond the depth)
      t2      C7  C8                       visited: C7                (the lookahead is used up)
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import islice

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.sequence import Sequence

_REMEMBERED_TENANTS = 4096

LOOKAHEAD = 256
"""Sequences without a ready prefix that one walk visits."""

_LOOKAHEAD_PER_TENANT = 64
"""How far back in the queue of one tenant it looks for them."""


def _order(sequence: Sequence) -> tuple[int, int]:
    """Sort key within a tenant: priority, then arrival. A preempted sequence keeps its place,
    because it keeps its id."""
    return sequence.request.priority, sequence.seq_id


def _keys(sequence: Sequence) -> set[PrefixKey | None]:
    """The prefixes that it needs: one, or those of all rows of an ensemble."""
    return {None if row.prefix is None else row.prefix.key for row in sequence.rows}


@dataclass(slots=True)
class _TenantQueue:
    """One tenant's waiting sequences, in order, all and by the prefix they need."""

    sequences: list[Sequence] = field(default_factory=list)
    by_prefix: dict[PrefixKey | None, list[Sequence]] = field(default_factory=dict)
    num_tokens: int = 0


class FairQueue:
    """Waiting sequences: by priority and arrival within a tenant, fair among tenants.

    ``num_sequences`` and ``num_tokens`` (prompt and output) count all that wait.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _TenantQueue] = {}
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last_emptied: str | None = None
        self._level = 0.0
        self.num_sequences = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self.num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue.sequences

    @property
    def tenants(self) -> list[str]:
        """Tenants with waiting sequences."""
        return list(self._queues)

    def counter(self, tenant: str) -> float:
        """Tokens charged to ``tenant`` so far, divided by its weight, lifts included."""
        return self._counters.get(tenant, self._level)

    def weight(self, tenant: str) -> float:
        """The tenant's share, as given by its latest request."""
        return self._weights.get(tenant, 1.0)

    def tokens_of(self, tenant: str) -> int:
        """Prompt and output tokens that wait for ``tenant``."""
        queue = self._queues.get(tenant)
        return queue.num_tokens if queue else 0

    def of(self, tenant: str) -> list[Sequence]:
        """The tenant's waiting sequences, in order."""
        queue = self._queues.get(tenant)
        return list(queue.sequences) if queue else []

    def first(self, tenant: str) -> Sequence:
        """The tenant's first waiting sequence; there is one."""
        return self._queues[tenant].sequences[0]

    def under(self, key: PrefixKey) -> Items[Sequence]:
        """The sequences that wait for the prefix, in their tenant's order; there is one."""
        return self._queues[key.tenant].by_prefix[key]

    def push(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that was preempted."""
        tenant = sequence.tenant
        self._weights[tenant] = sequence.request.weight
        queue = self._queues.get(tenant)
        if queue is None:
            self._enter(tenant)
            queue = self._queues[tenant] = _TenantQueue()
        insort(queue.sequences, sequence, key=_order)
        for key in _keys(sequence):
            insort(queue.by_prefix.setdefault(key, []), sequence, key=_order)
        queue.num_tokens += sequence.cost
        self.num_tokens += sequence.cost
        self.num_sequences += 1

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from any position in the queue."""
        queue, keys = self._queues[sequence.tenant], _keys(sequence)
        for ordered in (queue.sequences, *map(queue.by_prefix.__getitem__, keys)):
            del ordered[bisect_left(ordered, _order(sequence), key=_order)]
        for key in keys:
            if not queue.by_prefix[key]:
                del queue.by_prefix[key]
        queue.num_tokens -= sequence.cost
        self.num_tokens -= sequence.cost
        self.num_sequences -= 1
        if not queue.sequences:
            del self._queues[sequence.tenant]
            self._last_emptied = sequence.tenant

    def charge(self, tenant: str, tokens: int) -> None:
        """Charge ``tenant`` for ``tokens`` positions of service (prefix, prompt or output). While
        nothing waits no other tenant loses by it: those that arrive are lifted to this counter."""
        counter = self._counters.get(tenant, self._level) + tokens / self._weights.get(tenant, 1.0)
        self._counters[tenant] = counter
        if not self._queues:
            self._level = max(self._level, counter)

    def lift(self, tenant: str, level: float) -> None:
        """Raise the counter of ``tenant``, whose turn came at ``level`` and could not be used."""
        self._counters[tenant] = max(self.counter(tenant), level)

    def next_to_shed(self) -> Sequence | None:
        """The sequence to drop from an overfull queue: the last unstarted one of the tenant with
        the most queued tokens for its weight; None when all of that tenant's have started."""
        tenant = max(self._queues, key=lambda t: self.tokens_of(t) / self.weight(t))
        queued = reversed(self._queues[tenant].sequences)
        return next((sequence for sequence in queued if sequence.started is None), None)

    def has_runnable(self, ready: Container[PrefixKey]) -> bool:
        """Whether a sequence waits that needs no prefix, or one that is ``ready``."""
        keys = (key for queue in self._queues.values() for key in queue.by_prefix)
        return any(key is None or key in ready for key in keys)

    def in_order(
        self, *, ready: Iterable[PrefixKey], depth: int, lookahead: int = LOOKAHEAD
    ) -> Iterator[Sequence]:
        """Sequences in the order of service; ``charge``, ``lift`` and ``remove`` may be called
        between two of them, and the next is chosen by the counters as they are then.

        Of those that could run now (no prefix, or one that is ``ready``) the first ``depth`` for
        each prefix are visited, however far back they are; of the others only the first
        ``lookahead`` in total. So a long queue costs no more than a short one, and everything that
        could run is seen.
        """
        ready_of: dict[str, list[PrefixKey | None]] = {}
        for key in ready:
            ready_of.setdefault(key.tenant, [None]).append(key)

        def has_any(tenant: str) -> bool:
            by_prefix = self._queues[tenant].by_prefix
            without_prefix = None in by_prefix
            runs = depth > 0 and (without_prefix or tenant in ready_of)
            return runs or (lookahead > 0 and len(by_prefix) > without_prefix)

        turns = [
            (self.counter(tenant), position, tenant)
            for position, tenant in enumerate(self._queues)
            if has_any(tenant)
        ]
        heapq.heapify(turns)
        opened: dict[str, Iterator[Sequence]] = {}
        while turns:
            counter, position, tenant = turns[0]
            current = self.counter(tenant)
            if current > counter:  # it was charged since
                heapq.heapreplace(turns, (current, position, tenant))
                continue
            if tenant not in opened:
                keys = ready_of.get(tenant, [None])
                runnable, rest = self._choose(self._queues[tenant], keys, depth, lookahead)
                lookahead -= len(rest)
                opened[tenant] = heapq.merge(runnable, rest, key=_order)
                if rest and not lookahead:  # used up by these
                    turns = [turn for turn in turns if turn[2] in opened or has_any(turn[2])]
                    heapq.heapify(turns)
            sequence = next(opened[tenant], None)
            if sequence is None:
                heapq.heappop(turns)
            else:
                yield sequence

    @staticmethod
    def _choose(
        queue: _TenantQueue, keys: list[PrefixKey | None], depth: int, lookahead: int
    ) -> tuple[list[Sequence], list[Sequence]]:
        """The sequences of ``queue`` that could run now, and the first of the rest; in order."""
        # An ensemble waits for several prefixes, of which more than one may be ready.
        runnable = list(
            dict.fromkeys(s for key in keys for s in queue.by_prefix.get(key, ())[:depth])
        )
        runnable.sort(key=_order)
        front = queue.sequences[:_LOOKAHEAD_PER_TENANT]
        rest = (s for s in front if _keys(s).isdisjoint(keys))
        return runnable, list(islice(rest, lookahead))

    def _enter(self, tenant: str) -> None:
        """Lift a tenant that had nothing waiting: to the lowest of those that wait, or else to the
        tenant whose last sequence left the queue empty."""
        if self._queues:
            self._level = max(self._level, min(map(self.counter, self._queues)))
        elif self._last_emptied is not None:
            self._level = max(self._level, self.counter(self._last_emptied))
        self._counters[tenant] = max(self.counter(tenant), self._level)
        if len(self._counters) > 2 * (_REMEMBERED_TENANTS + len(self._queues)):
            self._forget_idle(tenant)

    def _forget_idle(self, entering: str) -> None:
        """Forget idle tenants whose counter the next lift would replace in any case."""
        keep = {*self._queues, entering, self._last_emptied}
        for tenant in list(self._counters):
            if tenant not in keep and self._counters[tenant] <= self._level:
                del self._counters[tenant]
                self._weights.pop(tenant, None)

    def __repr__(self) -> str:
        waiting = {tenant: len(queue.sequences) for tenant, queue in self._queues.items()}
        return f"FairQueue({waiting})"
