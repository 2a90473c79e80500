"""Failures that no request explains: after some of them the engine is not ready.

A part of a step explains its failure when the step had no other and ``probe_step`` succeeds
straight after it: then the failure says nothing about the server. When the probe fails too, it
counts against readiness. It is forgotten later: an engine that is not ready gets no requests, so no
step could succeed.
"""

import logging
from collections.abc import Sequence

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.pipeline import Pipeline, StepFailed
from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Step

log = logging.getLogger(__name__)

_MAX_FAILURES = 3
_FORGOTTEN_AFTER_S = 30.0

PROBE_ID = -1
"""The sequence id of a probe; those of requests start at 0."""


def probe_step(blocks: Sequence[int]) -> Step:
    """One token of the bare base in a free block: no request has a part in it. The other ``blocks``
    are for its state. It samples, because a device may report a failure only when a result is
    read."""
    sampling = SamplingParams(temperature=0.0)
    chunk = Chunk(PROBE_ID, (0,), 0, blocks[:1], sampling=sampling, side_blocks=blocks[1:])
    return Step(chunks=[chunk], fresh=list(blocks))


class Failures:
    """Counts the failures since a step succeeded. Any thread may read ``trouble``."""

    def __init__(self, pipeline: Pipeline, *, num_blocks: int) -> None:
        """``num_blocks`` are what a probe takes."""
        self._pipeline = pipeline
        self._num_blocks = num_blocks
        self._last = 0.0
        self.count = 0

    def explain(self, pool: BlockPool, *, now: float) -> None:
        """Count a failure unless a probe succeeds now; nothing is in flight."""
        if self._probe(pool):
            self.count = 0
        else:
            self.count += 1
            self._last = now

    def trouble(self, *, now: float) -> str | None:
        """Why the engine is not ready; None when it is."""
        if self.count >= _MAX_FAILURES and now - self._last < _FORGOTTEN_AFTER_S:
            return f"the last {self.count} steps failed"
        return None

    def _probe(self, pool: BlockPool) -> bool:
        """Whether a step of the bare base succeeds."""
        if pool.num_free < self._num_blocks:
            return False
        blocks = pool.allocate(self._num_blocks)
        try:
            self._pipeline.submit(probe_step(blocks))
            output = self._pipeline.collect().output
        except StepFailed:
            log.exception("a step of the bare base failed too")
            return False
        finally:
            pool.release(blocks)
        return output.sampled[PROBE_ID][0].finite
