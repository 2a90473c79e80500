"""The background class: sequences that take what all others, the foreground, leave idle.

It has a queue and a list of running sequences of its own, so that the foreground is planned as if
nothing else were there. What it lacks then, in blocks, it takes from here, at once: the youngest
sequence is preempted first, and a prefix that nothing else needs starts its compile over. Within
the class the order is that of the fair queue: by weight among tenants.

The counters are not those of the foreground. With common ones a tenant's batch would delay its own
interactive requests: it runs while the others are idle, and all that it was charged meanwhile would
count as service that those others did not get.

``background_builder`` plans its parts of a step, ``background_share`` says how large they may be.
"""

from collections.abc import Callable

from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.residency import Residency
from prefixd.server.engine.sequence import Sequence


class Background:
    """What waits and what runs of the class, oldest first. ``num_alive`` are both together, for a
    test in each step of a server without batches. ``num_preemptions`` counts those of
    both kinds: for the foreground, and for each other."""

    def __init__(self, *, residency: Residency, preempt: Callable[[Sequence], None]) -> None:
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_alive = 0
        self.num_preemptions = 0
        self._residency = residency
        self._preempt = preempt

    @property
    def num_loading(self) -> int:
        """Prefixes that are loading for this class alone."""
        residency = self._residency
        if not residency.num_loading or not self.waiting.num_sequences:
            return 0
        return sum(not residency.is_wanted(entry.key) for entry in residency.loading())

    def yield_blocks(self) -> bool:
        """Release the blocks of one sequence or compile; False: it holds none."""
        if self.running:
            self._preempt(self.running[-1])
            return True
        if self._residency.num_loading:
            for entry in reversed(self._residency.compiling()):
                if not self._residency.is_wanted(entry.key):
                    self._residency.unplace(entry)
                    return True
        return False

    def yield_prefix(self) -> bool:
        """Preempt the youngest sequence that runs under a prefix; False: there is none."""
        for sequence in reversed(self.running):
            if sequence.prefix is not None:
                self._preempt(sequence)
                return True
        return False

    def __repr__(self) -> str:
        return f"Background(running={len(self.running)}, {self.waiting})"
