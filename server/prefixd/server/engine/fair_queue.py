"""Fair queue of waiting sequences: a Virtual Token Counter per tenant.

"Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), algorithm 2, weighted: serve
the tenant that has been served least for its weight, charge it what it gets, and lift a tenant
that comes back from idleness to where the others are, so that idleness cannot be saved up.

A tenant that waits and cannot be served (its prefix is not there yet) saves nothing up either:
``in_order`` passed it by, and it is lifted to the counter of the first that was served instead.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.sequence import Sequence

_REMEMBERED_TENANTS = 4096

LOOKAHEAD = 256
"""Sequences whose prefix is not there that one walk comes to."""

_LOOKAHEAD_OF_ONE = 64
"""Of those, how far back in the line of one tenant."""


def _place(sequence: Sequence) -> tuple[int, int]:
    """Where a sequence stands among its tenant's: by priority, then by arrival. A preempted one
    keeps its place, since it keeps its arrival."""
    return sequence.request.priority, sequence.seq_id


@dataclass(slots=True)
class _Line:
    """One tenant's waiting sequences, in order, all and by the prefix they need."""

    sequences: list[Sequence] = field(default_factory=list)
    by_prefix: dict[PrefixKey | None, list[Sequence]] = field(default_factory=dict)
    num_tokens: int = 0

    def insert(self, sequence: Sequence) -> None:
        for line in (self.sequences, self.by_prefix.setdefault(_key(sequence), [])):
            insort(line, sequence, key=_place)
        self.num_tokens += sequence.request.cost

    def remove(self, sequence: Sequence) -> None:
        same = self.by_prefix[_key(sequence)]
        for line in (self.sequences, same):
            del line[bisect_left(line, _place(sequence), key=_place)]
        if not same:
            del self.by_prefix[_key(sequence)]
        self.num_tokens -= sequence.request.cost


def _key(sequence: Sequence) -> PrefixKey | None:
    return None if sequence.prefix is None else sequence.prefix.key


class FairQueue:
    """Waiting sequences: by priority and arrival within a tenant, fair among tenants."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._wanted: Counter[PrefixKey] = Counter()
        self._last_left: str | None = None
        self._level = 0.0
        self.num_tokens = 0

    def __len__(self) -> int:
        return sum(len(line.sequences) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line.sequences

    @property
    def tenants(self) -> list[str]:
        """Tenants with something waiting."""
        return list(self._lines)

    def counter(self, tenant: str) -> float:
        """Tokens charged to ``tenant`` by weight so far (lifts included)."""
        return self._counters.get(tenant, self._level)

    def weight(self, tenant: str) -> float:
        """The tenant's share, as its latest request said."""
        return self._weights.get(tenant, 1.0)

    def tokens_of(self, tenant: str) -> int:
        """Prompt and output tokens that wait for ``tenant``."""
        line = self._lines.get(tenant)
        return line.num_tokens if line else 0

    def of(self, tenant: str) -> list[Sequence]:
        """The tenant's waiting sequences, in order."""
        line = self._lines.get(tenant)
        return list(line.sequences) if line else []

    def wants(self, key: PrefixKey) -> bool:
        """Whether a waiting sequence will run under the prefix."""
        return self._wanted[key] > 0

    def first_under(self, key: PrefixKey) -> Sequence:
        """The next in its tenant's line that will run under a wanted prefix."""
        return self._lines[key.tenant].by_prefix[key][0]

    def push(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that was preempted."""
        tenant = sequence.tenant
        self._weights[tenant] = sequence.request.weight
        line = self._lines.get(tenant)
        if line is None:
            self._enter(tenant)
            line = self._lines[tenant] = _Line()
        line.insert(sequence)
        self.num_tokens += sequence.request.cost
        if sequence.prefix is not None:
            self._wanted[sequence.prefix.key] += 1

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it stands."""
        line = self._lines[sequence.tenant]
        line.remove(sequence)
        self.num_tokens -= sequence.request.cost
        if not line.sequences:
            del self._lines[sequence.tenant]
            self._last_left = sequence.tenant
        if sequence.prefix is not None:
            self._wanted[sequence.prefix.key] -= 1
            if not self._wanted[sequence.prefix.key]:
                del self._wanted[sequence.prefix.key]

    def charge(self, tenant: str, tokens: int) -> None:
        """Count ``tokens`` positions of service (prefix, prompt or output) to ``tenant``. While
        nobody waits it is taken from nobody: those that come are lifted to where it stands."""
        counter = self._counters[tenant] = self.counter(tenant) + tokens / self.weight(tenant)
        if not self._lines:
            self._level = max(self._level, counter)

    def lift(self, tenant: str, level: float) -> None:
        """``tenant`` had its turn when the counters stood at ``level``, and could not use it."""
        self._counters[tenant] = max(self.counter(tenant), level)

    def in_order(
        self, *, ready: Iterable[PrefixKey], depth: int, lookahead: int = LOOKAHEAD
    ) -> Iterator[Sequence]:
        """Sequences in the order of service; ``charge``, ``lift`` and ``remove`` may be called
        between two of them, and the next is chosen by the counters as they are.

        Of those that could run now (no prefix, or one that is ``ready``) ``depth`` for each prefix
        come, however far back they stand; of the others only the first ``lookahead`` of all. So a
        long queue costs no more than a short one, and nothing that could run is out of sight.
        """
        ready_of: dict[str, list[PrefixKey | None]] = {}
        for key in ready:
            ready_of.setdefault(key.tenant, [None]).append(key)

        def gives(tenant: str) -> bool:
            others = self._lines[tenant].by_prefix
            bare = None in others
            runs = depth > 0 and (bare or tenant in ready_of)
            return runs or (lookahead > 0 and len(others) > bare)

        turns = [
            (self.counter(tenant), place, tenant)
            for place, tenant in enumerate(self._lines)
            if gives(tenant)
        ]
        heapq.heapify(turns)
        opened: dict[str, Iterator[Sequence]] = {}
        while turns:
            counter, place, tenant = turns[0]
            now = self.counter(tenant)
            if now > counter:  # it was charged since
                heapq.heapreplace(turns, (now, place, tenant))
                continue
            if tenant not in opened:
                keys = ready_of.get(tenant, [None])
                able, others = self._choose(self._lines[tenant], keys, depth, lookahead)
                lookahead -= len(others)
                opened[tenant] = merge(able, others, key=_place)
                if others and not lookahead:  # used up by these
                    turns = [turn for turn in turns if turn[2] in opened or gives(turn[2])]
                    heapq.heapify(turns)
            sequence = next(opened[tenant], None)
            if sequence is None:
                heapq.heappop(turns)
            else:
                yield sequence

    @staticmethod
    def _choose(
        line: _Line, keys: list[PrefixKey | None], depth: int, lookahead: int
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Those of ``line`` that could run now, and the first of the others; both in order."""
        able = [s for key in keys for s in line.by_prefix.get(key, ())[:depth]]
        able.sort(key=_place)
        known = set(keys)
        others = (s for s in line.sequences[:_LOOKAHEAD_OF_ONE] if _key(s) not in known)
        return able, list(islice(others, lookahead))

    def _enter(self, tenant: str) -> None:
        """Lift a tenant that had nothing waiting: to the least of those that wait, or where the
        last one stood that left the queue empty."""
        if self._lines:
            self._level = max(self._level, min(map(self.counter, self._lines)))
        elif self._last_left is not None:
            self._level = max(self._level, self.counter(self._last_left))
        self._counters[tenant] = max(self.counter(tenant), self._level)
        if len(self._counters) > 2 * (_REMEMBERED_TENANTS + len(self._lines)):
            self._forget_idle(tenant)

    def _forget_idle(self, entering: str) -> None:
        """Forget tenants whose counter the next lift would replace anyhow."""
        keep = {*self._lines, entering, self._last_left}
        for tenant in list(self._counters):
            if tenant not in keep and self._counters[tenant] <= self._level:
                del self._counters[tenant]
                self._weights.pop(tenant, None)

    def __repr__(self) -> str:
        waiting = {tenant: len(line.sequences) for tenant, line in self._lines.items()}
        return f"FairQueue({waiting})"
