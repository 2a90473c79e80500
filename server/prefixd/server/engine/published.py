"""What the core publishes: other threads read it while steps run.

It is replaced as a whole, and never changed afterwards. Only ``tiers``, which may be long, is
changed in place, key by key: others look up a key, or copy it.
"""

from collections.abc import Mapping
from math import inf

from prefixd.server.engine.preloads import Preloads
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.stats import EngineStats, StatsCounters


class PublishedState:
    """``tiers`` says how far prefixes are, ``preloads`` how many each tenant has, ``stats`` are the
    figures of the moment ``stats_built``. The queue and its rate go to the limiter."""

    def __init__(
        self, scheduler: Scheduler, *, counters: StatsCounters, queue_limiter: QueueLimiter
    ) -> None:
        self._counters = counters
        self._queue_limiter = queue_limiter
        self._preloads_version = -1
        self._was_queued = self._had_background = False
        self.tiers: dict[PrefixKey, str] = {}
        self.preloads: Mapping[str, int] = {}
        self.stats = counters.snapshot(scheduler)
        self.stats_built = -inf

    def clear(self) -> None:
        """Begin again with an empty scheduler."""
        self.tiers, self._preloads_version = {}, -1

    def update(self, scheduler: Scheduler) -> None:
        """Publish what has changed since the last time."""
        for key, tier in scheduler.memory.take_tier_changes().items():
            if tier is None:
                self.tiers.pop(key, None)
            else:
                self.tiers[key] = tier
        preloads = scheduler.prefix_loader.preloads
        if preloads.num_changes != self._preloads_version:
            self._preloads_version = preloads.num_changes
            self.update_preloads(preloads)
        self._queue_limiter.rate = self._counters.rate
        is_queued = scheduler.waiting.num_sequences > 0
        if is_queued or self._was_queued:
            self._queue_limiter.publish(scheduler.waiting)
            self._was_queued = is_queued
        has_background = scheduler.background.num_alive > 0
        if has_background or self._had_background:
            self._queue_limiter.publish(scheduler.background.waiting, background=True)
            self._had_background = has_background

    def update_preloads(self, preloads: Preloads) -> None:
        """Publish how many preloads there are, before the turn ends."""
        self.preloads = preloads.by_tenant()

    def build_stats(self, scheduler: Scheduler, *, now: float) -> EngineStats:
        """Build and publish the figures of this moment."""
        self.stats_built = now
        self.stats = self._counters.snapshot(scheduler)
        return self.stats
