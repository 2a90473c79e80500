"""The gate: how much may wait, decided on the caller's thread before anything is queued."""

import threading
from collections import Counter

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.request import AdmittedRequest, QueueFull

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0


class QueueLimiter:
    """Bounds what waits, by tokens of prompt and output. Safe from any thread.

    A tenant with less than its share of a full queue still gets in: then whoever has most waiting
    gives way (``Scheduler.add``), so that one tenant's crowd never shuts out another.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._most = config.max_waiting_tokens
        self._lock = threading.RLock()
        self._coming: Counter[str] = Counter()
        self._waiting: dict[str, tuple[int, float]] = {}
        self._rate = 0.0
        self.closed: str | None = None

    def check(self, tenant: str, *, weight: float) -> None:
        """Raise QueueFull when not even the smallest request of ``tenant`` would be let in: what
        is refused in a crowd should cost next to nothing."""
        with self._lock:
            self._check(tenant, weight, cost=1)

    def enter(self, request: AdmittedRequest) -> None:
        """Let a request in, or raise QueueFull."""
        cost = request.cost * request.n
        with self._lock:
            self._check(request.tenant, request.weight, cost)
            self._coming[request.tenant] += cost

    def entered(self, request: AdmittedRequest) -> None:
        """The request is in the scheduler's hands; ``publish`` will count it from here on."""
        with self._lock:
            self._coming[request.tenant] -= request.cost * request.n
            if not self._coming[request.tenant]:
                del self._coming[request.tenant]

    def publish(self, waiting: FairQueue, *, rate: float) -> None:
        """What waits now, and how many tokens run in a second."""
        by_tenant = {t: (waiting.tokens_of(t), waiting.weight(t)) for t in waiting.tenants}
        with self._lock:
            self._waiting, self._rate = by_tenant, rate

    @property
    def retry_after(self) -> float:
        """Seconds until what waits now will have run."""
        with self._lock:
            wait = self._total / self._rate if self._rate else _SHORTEST_RETRY_S
        return min(max(wait, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    @property
    def _total(self) -> int:
        return sum(tokens for tokens, _ in self._waiting.values()) + self._coming.total()

    def _check(self, tenant: str, weight: float, cost: int) -> None:
        if self.closed is not None:
            raise QueueFull(self.closed, retry_after=_SHORTEST_RETRY_S)
        if not self._fits(tenant, weight, cost):
            raise QueueFull(
                f"the server is full: {self._total} tokens wait, of at most {self._most}",
                retry_after=self.retry_after,
            )

    def _fits(self, tenant: str, weight: float, cost: int) -> bool:
        total = self._total
        if self._most is None or total == 0 or total + cost <= self._most:
            return True
        own, _ = self._waiting.get(tenant, (0, 0.0))
        weights = {name: share for name, (_, share) in self._waiting.items()}
        weights[tenant] = weight
        share = self._most * weight / sum(weights.values())
        return own + self._coming[tenant] + cost <= share
