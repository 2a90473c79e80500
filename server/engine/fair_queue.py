"""Fair queue of waiting sequences: a Virtual Token Counter per tenant.

"Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), algorithm 2: serve the
tenant that has been served least, charge it what it gets, and lift a tenant that comes back from
idleness to the least counter of those waiting, so that idleness cannot be saved up.
"""

from collections import Counter, deque
from collections.abc import Iterator

from server.engine.request import PrefixKey
from server.engine.sequence import Sequence


class FairQueue:
    """Waiting sequences, first come first served within a tenant, fair among tenants."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._counters: dict[str, int] = {}
        self._wanted: Counter[PrefixKey] = Counter()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def counter(self, tenant: str) -> int:
        """Tokens charged to ``tenant`` so far (lifts included)."""
        return self._counters.get(tenant, 0)

    def wants(self, key: PrefixKey) -> bool:
        """Whether a waiting sequence will run under the prefix."""
        return self._wanted[key] > 0

    def push(self, sequence: Sequence) -> None:
        """Queue a new sequence behind its tenant's others."""
        self._enter(sequence).append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before its tenant's others: it has waited already."""
        self._enter(sequence).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it stands."""
        queue = self._queues[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.tenant]
        if sequence.prefix is not None:
            self._wanted[sequence.prefix.key] -= 1
            if not self._wanted[sequence.prefix.key]:
                del self._wanted[sequence.prefix.key]

    def charge(self, tenant: str, tokens: int) -> None:
        """Count ``tokens`` positions of service (prefix, prompt or output) to ``tenant``."""
        self._counters[tenant] = self._counters.get(tenant, 0) + tokens

    def in_order(self) -> Iterator[Sequence]:
        """Sequences in the order of service, over a snapshot; ``charge`` and ``remove`` may be
        called between two of them, and the next is then chosen by the counters as they are."""
        left = {tenant: iter(tuple(queue)) for tenant, queue in self._queues.items()}
        while left:
            tenant = min(left, key=self.counter)
            sequence = next(left[tenant], None)
            if sequence is None:
                del left[tenant]
            else:
                yield sequence

    def _enter(self, sequence: Sequence) -> deque[Sequence]:
        tenant = sequence.tenant
        if sequence.prefix is not None:
            self._wanted[sequence.prefix.key] += 1
        queue = self._queues.get(tenant)
        if queue is None:
            least = min((self.counter(other) for other in self._queues), default=0)
            self._counters[tenant] = max(self.counter(tenant), least)
            queue = self._queues[tenant] = deque()
        return queue

    def __repr__(self) -> str:
        waiting = {tenant: len(queue) for tenant, queue in self._queues.items()}
        return f"FairQueue({waiting})"
