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
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.request import PrefixKey
from server.engine.sequence import Sequence

_REMEMBERED_TENANTS = 4096


def _place(sequence: Sequence) -> tuple[int, int]:
    """Where a sequence stands among its tenant's: by priority, then by arrival. A preempted one
    keeps its place, since it keeps its arrival."""
    return sequence.request.priority, sequence.seq_id


@dataclass(slots=True)
class _Line:
    """One tenant's waiting sequences, in order."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0


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

    def push(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that was preempted."""
        tenant = sequence.tenant
        self._weights[tenant] = sequence.request.weight
        line = self._lines.get(tenant)
        if line is None:
            self._enter(tenant)
            line = self._lines[tenant] = _Line()
        insort(line.sequences, sequence, key=_place)
        line.num_tokens += sequence.request.cost
        self.num_tokens += sequence.request.cost
        if sequence.prefix is not None:
            self._wanted[sequence.prefix.key] += 1

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it stands."""
        line = self._lines[sequence.tenant]
        del line.sequences[bisect_left(line.sequences, _place(sequence), key=_place)]
        line.num_tokens -= sequence.request.cost
        self.num_tokens -= sequence.request.cost
        if not line.sequences:
            del self._lines[sequence.tenant]
            self._last_left = sequence.tenant
        if sequence.prefix is not None:
            self._wanted[sequence.prefix.key] -= 1
            if not self._wanted[sequence.prefix.key]:
                del self._wanted[sequence.prefix.key]

    def charge(self, tenant: str, tokens: int) -> None:
        """Count ``tokens`` positions of service (prefix, prompt or output) to ``tenant``."""
        self._counters[tenant] = self.counter(tenant) + tokens / self.weight(tenant)

    def lift(self, tenant: str, level: float) -> None:
        """``tenant`` had its turn when the counters stood at ``level``, and could not use it."""
        self._counters[tenant] = max(self.counter(tenant), level)

    def in_order(self, *, lookahead: int) -> Iterator[Sequence]:
        """Sequences in the order of service, over a snapshot; ``charge``, ``lift`` and ``remove``
        may be called between two of them, and the next is chosen by the counters as they are.

        Of each tenant at most ``lookahead`` come: a long queue costs no more than a short one.
        """
        lines = {tenant: line.sequences[:lookahead] for tenant, line in self._lines.items()}
        taken = dict.fromkeys(lines, 0)
        turns = [(self.counter(tenant), place, tenant) for place, tenant in enumerate(lines)]
        heapq.heapify(turns)
        while turns:
            counter, place, tenant = turns[0]
            now = self.counter(tenant)
            if now > counter:  # it was charged since
                heapq.heapreplace(turns, (now, place, tenant))
                continue
            if taken[tenant] == len(lines[tenant]):
                heapq.heappop(turns)
                continue
            taken[tenant] += 1
            yield lines[tenant][taken[tenant] - 1]

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
