"""Steps in flight: submitted to the runner, and collected in the same order."""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from prefixd.server.engine.runner import Masks, ModelRunner
from prefixd.server.engine.step import Step, StepOutput

log = logging.getLogger(__name__)


class StepFailed(Exception):
    """The runner raised ``error`` for ``step``. ``alone``: no other was ever in flight with it."""

    def __init__(self, step: Step, error: Exception, *, alone: bool) -> None:
        super().__init__(str(error))
        self.step, self.error, self.alone = step, error, alone


class Collected(NamedTuple):
    """A step that has run, its output, the seconds that the device spent on it, and those since the
    step before it was collected, or the same after a pause."""

    step: Step
    output: StepOutput
    seconds: float
    period: float


class Pipeline:
    """The steps that were submitted and not collected."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._in_flight: deque[tuple[Step, float, bool]] = deque()
        self._unmasked: Step | None = None  # whose masks are to come
        self._collected_at = 0.0
        self._paused = True

    def __len__(self) -> int:
        return len(self._in_flight)

    def holds(self, step: Step) -> bool:
        """Whether ``step`` is in flight."""
        return any(step is each for each, _, _ in self._in_flight)

    def submit(self, step: Step) -> None:
        """Raise StepFailed when it cannot begin; the steps before it are still in flight then."""
        submitted_at, is_first = time.perf_counter(), not self._in_flight
        try:
            self.runner.submit(step)
        except Exception as error:
            raise StepFailed(step, error, alone=is_first) from error
        self._in_flight.append((step, submitted_at, is_first))
        self._unmasked = step if step.masked else None

    @property
    def needs_masks(self) -> bool:
        """Whether the step submitted last waits for ``complete``."""
        return self._unmasked is not None

    def complete(self, masks: Callable[[], Masks]) -> None:
        """Let the masked rows of the step submitted last be sampled."""
        self._unmasked = None
        self.runner.complete(masks)

    def collect(self) -> Collected:
        """The oldest step. Raise StepFailed when it failed; nothing is in flight then: what the
        steps behind it computed is dropped."""
        step, submitted_at, is_first = self._in_flight.popleft()
        try:
            output = self.runner.collect()
        except Exception as error:
            alone = is_first and not self._in_flight
            self.discard()
            raise StepFailed(step, error, alone=alone) from error
        # The device began with it when it was submitted, or when the step before had ended.
        before, self._collected_at = self._collected_at, time.perf_counter()
        seconds = self._collected_at - max(submitted_at, before)
        period = seconds if self._paused else self._collected_at - before
        self._paused = False
        return Collected(step, output, seconds, period)

    def pause(self) -> None:
        """Nothing is in flight, and there is no next step yet."""
        self._paused = True

    def discard(self) -> None:
        """Wait for the steps in flight, and drop their output."""
        while self._in_flight:
            step, _, _ = self._in_flight.popleft()
            try:
                if step is self._unmasked:
                    self.complete(dict)
                self.runner.collect()
            except Exception as error:  # noqa: BLE001 - its output is not needed
                log.warning("a step behind a failed one failed too (%s)", type(error).__name__)
        self._unmasked = None
