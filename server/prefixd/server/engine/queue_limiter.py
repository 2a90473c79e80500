"""The bound on queued work, checked on the caller's thread before a request is queued."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.request import AdmittedRequest, QueueFull
from prefixd.server.engine.sequence import cost_of

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0


@dataclass(slots=True)
class _Backlog:
    """Tokens of one class that wait, by tenant: those not queued yet, and those queued with the
    tenant's weight."""

    name: str
    entering: Counter[str] = field(default_factory=Counter)
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(tokens for tokens, _ in self.waiting.values()) + self.entering.total()

    def share(self, tenant: str, *, weight: float) -> float:
        """The part of all that waits that ``tenant`` may have."""
        weights = {name: share for name, (_, share) in self.waiting.items()}
        weights[tenant] = weight
        return weight / sum(weights.values())

    def of(self, tenant: str) -> int:
        own, _ = self.waiting.get(tenant, (0, 0.0))
        return own + self.entering[tenant]


class QueueLimiter:
    """Bounds what waits, in tokens of prompt and output. Safe from any thread.

    A tenant below its share of a full queue is still admitted: then the tenant with the most queued
    work is shed (``FairQueue.next_to_shed``), so that no tenant can take the whole queue. The
    background class has the same bound to itself. Nothing of it is shed, so each further tenant can
    add its share to a full queue.

    ``closed`` is why no request is admitted any more; ``rate`` is how many tokens run per second.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._max_tokens = config.max_waiting_tokens
        self._lock = threading.RLock()
        self._foreground = _Backlog("tokens")
        self._background = _Backlog("tokens of the background class")
        self.rate = 0.0
        self.closed: str | None = None

    def check(self, tenant: str, *, weight: float, cost: int = 1, background: bool = False) -> None:
        """Raise QueueFull when a request of ``cost`` tokens is not admitted; by default the
        smallest, so that a refusal under heavy load costs very little."""
        if self.closed is not None:
            raise QueueFull(self.closed, retry_after=_MIN_RETRY_S)
        if self._max_tokens is None:
            return
        with self._lock:
            backlog = self._backlog(background=background)
            total = backlog.total
            if total and total + cost > self._max_tokens:
                share = self._max_tokens * backlog.share(tenant, weight=weight)
                if backlog.of(tenant) + cost > share:
                    raise QueueFull(
                        f"the server is full: {total} {backlog.name} wait, of at most "
                        f"{self._max_tokens}",
                        retry_after=self._retry_after(backlog),
                    )

    def enter(self, request: AdmittedRequest) -> None:
        """Admit a request, or raise QueueFull."""
        cost, is_background = cost_of(request) * request.n, request.background
        with self._lock:
            self.check(request.tenant, weight=request.weight, cost=cost, background=is_background)
            self._backlog(background=is_background).entering[request.tenant] += cost

    def entered(self, request: AdmittedRequest) -> None:
        """The request is queued; ``publish`` counts it from here on."""
        with self._lock:
            entering = self._backlog(background=request.background).entering
            entering[request.tenant] -= cost_of(request) * request.n
            if not entering[request.tenant]:
                del entering[request.tenant]

    def publish(self, waiting: FairQueue, *, background: bool = False) -> None:
        """Take over what waits now of one class."""
        by_tenant = {t: (waiting.tokens_of(t), waiting.weight(t)) for t in waiting.tenants}
        with self._lock:
            self._backlog(background=background).waiting = by_tenant

    @property
    def retry_after(self) -> float:
        """Seconds until what waits now will have run."""
        with self._lock:
            return self._retry_after(self._foreground)

    def _retry_after(self, backlog: _Backlog) -> float:
        wait = backlog.total / self.rate if self.rate else _MIN_RETRY_S
        return min(max(wait, _MIN_RETRY_S), _MAX_RETRY_S)

    def _backlog(self, *, background: bool) -> _Backlog:
        return self._background if background else self._foreground
