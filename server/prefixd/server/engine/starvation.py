"""Which running sequence is preempted for a tenant that waits and of which nothing runs.

Sequences run until they end, so a tenant with long ones could hold all blocks and all places while
another tenant's turn has come. After ``max_tenant_wait_s`` the tenant with the most blocks for its
weight gives one sequence back::

    blocks      tenant a: [oldest ......][second ....][youngest ...]      b waits, nothing of b runs
    one step    tenant a: [oldest ......][second ....]   preempted    ->  b starts in its place

Every tenant keeps its oldest sequence, so that it advances: unless that one holds more than half
of the pool. Then it is preempted too, once it has advanced enough since the last time.
"""

from collections import Counter

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.sequence import Sequence

_LEAST_PROGRESS = 64
"""Output tokens of a tenant's only sequence between two times that it yields."""


class StarvationPolicy:
    """Chooses the sequence that yields. It reads the scheduler's queue and running list."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        waiting: FairQueue,
        running: list[Sequence],
        memory: Memory,
    ) -> None:
        self._config = config
        self._waiting = waiting
        self._running = running
        self._memory = memory
        self._since: dict[str, float] = {}
        self._check_at = 0.0

    def victim(self, *, now: float) -> Sequence | None:
        """The sequence to preempt before this step; None: no tenant has waited long enough."""
        limit = self._config.max_tenant_wait_s
        if limit is None or now < self._check_at:
            return None
        running = {sequence.tenant for sequence in self._running}
        starved = [tenant for tenant in self._waiting.tenants if tenant not in running]
        self._since = {tenant: self._since.get(tenant, now) for tenant in starved}
        due = [tenant for tenant in starved if now - self._since[tenant] >= limit]
        victim = None
        if due:
            tenant = min(due, key=self._waiting.counter)
            victim = self._largest(self._waiting.counter(tenant))
        if victim is None:
            self._check_at = now + limit / 4  # so that most steps cost nothing
        elif not self._memory.is_ready(self._waiting.first(tenant)):
            self._since[tenant] = now  # its prefix has yet to come: room for one is enough
        return victim

    def _largest(self, counter: float) -> Sequence | None:
        """The youngest sequence of the tenant with the most blocks for its weight, among those
        that were served more than ``counter`` says."""
        blocks: Counter[str] = Counter()
        for sequence in self._running:
            blocks[sequence.tenant] += sequence.num_blocks
        held = {
            tenant: count / self._waiting.weight(tenant)
            for tenant, count in blocks.items()
            if self._waiting.counter(tenant) > counter
        }
        for tenant in sorted(held, key=lambda tenant: held[tenant], reverse=True):
            sequences = [s for s in self._running if s.tenant == tenant and s.leader is s]
            if len(sequences) > 1 or self._may_yield(sequences[0]):
                return sequences[-1]
        return None

    def _may_yield(self, sequence: Sequence) -> bool:
        num_blocks = sum(row.num_blocks for row in sequence.rows)
        takes_most = 2 * num_blocks > self._config.num_usable_blocks
        return takes_most and sequence.num_output >= _LEAST_PROGRESS * (sequence.num_yields + 1)
