"""The bound on queued work, checked on the caller's thread before a request is queued."""

import threading
from collections import Counter

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.request import AdmittedRequest, QueueFull
from prefixd.server.engine.sequence import cost_of

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0


class QueueLimiter:
    """Bounds what waits, in tokens of prompt and output. Safe from any thread.

    A tenant below its share of a full queue is still admitted: then the tenant with the most queued
    work is shed (``FairQueue.next_to_shed``), so that no tenant can take the whole queue.

    ``closed`` is why no request is admitted any more; ``rate`` is how many tokens run per second.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._max_tokens = config.max_waiting_tokens
        self._lock = threading.RLock()
        self._entering: Counter[str] = Counter()
        self._waiting: dict[str, tuple[int, float]] = {}
        self.rate = 0.0
        self.closed: str | None = None

    def check(self, tenant: str, *, weight: float, cost: int = 1) -> None:
        """Raise QueueFull when a request of ``cost`` tokens is not admitted; by default the
        smallest, so that a refusal under heavy load costs very little."""
        if self.closed is not None:
            raise QueueFull(self.closed, retry_after=_MIN_RETRY_S)
        if self._max_tokens is None:
            return
        with self._lock:
            total = self._total()
            if total and total + cost > self._max_tokens:
                own, _ = self._waiting.get(tenant, (0, 0.0))
                weights = {name: share for name, (_, share) in self._waiting.items()}
                weights[tenant] = weight
                share = self._max_tokens * weight / sum(weights.values())
                if own + self._entering[tenant] + cost > share:
                    raise QueueFull(
                        f"the server is full: {total} tokens wait, of at most {self._max_tokens}",
                        retry_after=self.retry_after,
                    )

    def enter(self, request: AdmittedRequest) -> None:
        """Admit a request, or raise QueueFull."""
        cost = cost_of(request) * request.n
        with self._lock:
            self.check(request.tenant, weight=request.weight, cost=cost)
            self._entering[request.tenant] += cost

    def entered(self, request: AdmittedRequest) -> None:
        """The request is queued; ``publish`` counts it from here on."""
        with self._lock:
            self._entering[request.tenant] -= cost_of(request) * request.n
            if not self._entering[request.tenant]:
                del self._entering[request.tenant]

    def publish(self, waiting: FairQueue) -> None:
        """Take over what waits now."""
        by_tenant = {t: (waiting.tokens_of(t), waiting.weight(t)) for t in waiting.tenants}
        with self._lock:
            self._waiting = by_tenant

    @property
    def retry_after(self) -> float:
        """Seconds until what waits now will have run."""
        with self._lock:
            wait = self._total() / self.rate if self.rate else _MIN_RETRY_S
        return min(max(wait, _MIN_RETRY_S), _MAX_RETRY_S)

    def _total(self) -> int:
        return sum(tokens for tokens, _ in self._waiting.values()) + self._entering.total()
