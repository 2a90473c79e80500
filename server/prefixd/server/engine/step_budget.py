"""How many prompt tokens a step may run: as many as keep its time within a bound.

A step takes the time of its decode rows and, for each prompt or virtual token, the cost of one
token. Both are medians of the last steps, so that one slow step changes nothing::

    tokens = (bound - time of a step that only decodes) / cost of one token

The bound is the gap that a running stream may see; a step in which nothing decodes may take longer,
since only its end is waited for: by new requests, aborts and timeouts.
"""

from collections import deque
from statistics import median

from prefixd.server.engine.step import Step

UNMEASURED = 256
"""Prompt tokens of a step before the cost of one is known."""

LEAST = 32
"""Prompt tokens that a step may always run. Fewer take nearly the same time: reading the weights
dominates."""

_WITHOUT_STREAMS = 4
"""A step in which nothing decodes may take so many times the bound."""

_SAMPLES = 9


class StepBudget:
    """Measures steps, and bounds the prompt tokens of the next one by ``max_gap_s``, in seconds
    (None: no bound)."""

    def __init__(self, max_gap_s: float | None) -> None:
        self._max_gap_s = max_gap_s
        self._decodes: deque[float] = deque(maxlen=_SAMPLES)
        self._costs: deque[float] = deque(maxlen=_SAMPLES)

    @property
    def decode_s(self) -> float:
        """Seconds of a step that only decodes; 0 before there was one."""
        return median(self._decodes) if self._decodes else 0.0

    @property
    def token_s(self) -> float | None:
        """Seconds that one prompt token adds to a step; None before it was measured."""
        return median(self._costs) if self._costs else None

    def observe(self, step: Step, seconds: float) -> None:
        """Take in how long a step took. Those that compile prefixes say nothing: some kinds are
        copied, and not run through the model."""
        if self._max_gap_s is None or step.compiles:
            return
        num_prompt = sum(len(chunk.tokens) for chunk in step.chunks if len(chunk.tokens) > 1)
        num_prompt += step.num_encoded
        if num_prompt >= LEAST:
            decodes = len(step.chunks) > 1 and any(len(c.tokens) == 1 for c in step.chunks)
            own = seconds - self.decode_s if decodes else seconds
            self._costs.append(max(own, seconds / 4) / num_prompt)
        elif not num_prompt and step.chunks:
            self._decodes.append(seconds)

    def prompt_tokens(self, *, num_decoding: int) -> int | None:
        """The most prompt and virtual tokens of a step with ``num_decoding`` decode rows; None: no
        bound."""
        if self._max_gap_s is None:
            return None
        cost = self.token_s
        if cost is None:
            return UNMEASURED
        if num_decoding:
            seconds = self._max_gap_s - self.decode_s
        else:
            seconds = _WITHOUT_STREAMS * self._max_gap_s
        return max(LEAST, int(seconds / max(cost, 1e-9)))
