"""How the engine has steps run: submitted before their results are needed, collected in order.

With a runner of ``depth`` 1 the engine is one step behind: it plans and submits a step while the
one before it runs, and its rows read their last token on the device::

    host    | submit 2 | collect 1 | update, plan 3 | submit 3 | deliver 1 | collect 2 | ...
    device  | ...... step 1 ......|........... step 2 ..........|........... step 3 ...
"""

from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Protocol

from prefixd.server.engine.step import Step, StepOutput

Masks = Mapping[int, bytes]
"""Bit masks (``constraint``) of the ids that may be sampled, by sequence id."""


class OutOfMemory(Exception):
    """The device had no memory for a step; smaller steps may succeed."""


class ModelRunner(Protocol):
    """Runs steps on the device, one after the other: what a step writes is there for the next, and
    nothing of a later step is written before an earlier one has read. Called by one thread only.

    ``depth`` is how many steps may be in flight while the next one is planned, 0 or 1.
    """

    @property
    def depth(self) -> int: ...

    def submit(self, step: Step) -> None:
        """Begin a step, and return without waiting for it.

        Raise OutOfMemory or any other exception when it cannot begin: it is not collected then.
        """
        ...

    def complete(self, masks: Callable[[], Masks]) -> None:
        """Let the rows in ``masked`` of the step submitted last be sampled, from the tokens in
        ``masks``: a sequence that is not in it is ended. ``masks()`` waits for them, and is called
        when they are needed. Called for each step with such rows, after all earlier steps were
        collected. What fails is raised when the step is collected."""
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest step that was submitted and not collected.

        Raise OutOfMemory, or any other exception when the pass failed. Later steps in flight are
        collected too, even if they depend on it.
        """
        ...


class BlockingRunner:
    """A runner that computes a step when it is collected: ``run`` is all it needs.

    Nothing runs while the host does other work, so ``depth`` is 0 except in tests.
    """

    depth = 0

    @cached_property
    def _submitted(self) -> deque[Step]:
        return deque()

    def submit(self, step: Step) -> None:
        """Keep the step."""
        self._submitted.append(step)

    def complete(self, masks: Callable[[], Masks]) -> None:
        """Keep what waits for the masks: ``run`` calls ``Step.join_masks`` before it samples."""
        self._submitted[-1].masks = masks

    def collect(self) -> StepOutput:
        """Run the oldest step."""
        return self.run(self._submitted.popleft())

    def run(self, step: Step) -> StepOutput:
        """Run one step. Raise OutOfMemory, or any other exception when the pass fails."""
        raise NotImplementedError
