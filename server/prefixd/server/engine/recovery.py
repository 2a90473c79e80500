"""After a failed step: smaller steps, and suspects that run alone.

::

    a step failed    | its parts                            | limits
    -----------------+--------------------------------------+---------------------------
    no memory        | start over; if nothing can be halved | halved by what the step
                     | it ends, or is a suspect [1]         | had; they double again
                     |                                      | every 32 good steps
    any other error  | are suspects: each runs in a step of | unchanged
                     | its own, all others pause; the part  |
                     | ends if the step had no other, and   |
                     | no proposed tokens [1]               |

[1] A part ends only by a step that had no other part and that was never in flight with another: a
device may report the failure of one step when another is collected. So what was in flight behind
the failed step starts over too, and is suspected with it. While suspects run nothing else is in
flight.

So only the request that breaks a step ends, and all others get the same answer as without it.
"""

from collections.abc import Sequence as Items

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Entry
from prefixd.server.engine.lookup import MAX_DRAFTS
from prefixd.server.engine.residency import Residency
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Step

_GROW_EVERY = 32
"""Steps that have to succeed before the limits double again."""


class OomBackoff:
    """Limits of a step: how many sequences may run, tokens of one part, and proposed tokens of one
    sequence. They are smaller for a while after the device ran out of memory; ``is_reduced`` says
    whether they are now."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._configured = config.max_running, config.max_prefill_chunk, MAX_DRAFTS
        self.max_running, self.max_chunk, self.max_drafts = self._configured
        self.is_reduced = False
        self._num_succeeded = 0

    def shrink(self, step: Step) -> bool:
        """Halve what of ``step`` can be halved; False when it was as small as possible.

        A part that the step had only one of says nothing about how many there may be. And what it
        was to save is gone: the next step needs no memory for that.
        """
        rows, is_divisible = len(step.chunks), step.num_parts > len(step.compiles) + 1
        longest = max([step.num_compiled, *(len(chunk.tokens) for chunk in step.chunks)])
        drafts = max([0, *(chunk.num_drafts for chunk in step.chunks)])
        self._num_succeeded = 0
        if is_divisible:
            self.max_running = min(self.max_running, rows // 2)
        if longest > 1:
            self.max_chunk = min(self.max_chunk, longest // 2)
        if drafts:
            self.max_drafts = min(self.max_drafts, drafts // 2)
        self._compare()
        return is_divisible or longest > 1 or drafts > 0 or bool(step.saves)

    def step_succeeded(self) -> None:
        """Count one step towards larger limits."""
        self._num_succeeded += 1
        if self._num_succeeded % _GROW_EVERY == 0:
            max_running, max_chunk, max_drafts = self._configured
            self.max_running = min(max_running, 2 * self.max_running)
            self.max_chunk = min(max_chunk, 2 * self.max_chunk)
            self.max_drafts = min(max_drafts, max(1, 2 * self.max_drafts))
            self._compare()

    def _compare(self) -> None:
        limits = self.max_running, self.max_chunk, self.max_drafts
        self.is_reduced = limits != self._configured


class Recovery:
    """What follows a failed step. ``suspects`` are the sequences and prefixes of failed steps that
    have not yet run alone, in the order of their turns."""

    def __init__(self, config: SchedulerConfig, *, residency: Residency) -> None:
        self.backoff = OomBackoff(config)
        self.suspects: dict[Sequence | Entry, None] = {}
        self._residency = residency

    def step_failed(
        self, steps: Items[Step], sequences: list[Sequence], *, out_of_memory: bool, alone: bool
    ) -> bool:
        """Take back the blocks of all compiles, and note the suspects. The first of ``steps``
        failed, the others were in flight behind it; ``sequences`` are those of all of them.
        ``alone``: there was never another in flight. Returns whether the part has to end."""
        ends = alone and steps[0].is_smallest
        retries = out_of_memory and self.backoff.shrink(steps[0])
        is_suspected = not retries and not ends
        in_steps = {part.key for step in steps for part in step.compiles}
        compiling = self._residency.compiling()
        for sequence in sequences:
            self.suspects.pop(sequence, None)
        for entry in compiling:
            self.suspects.pop(entry, None)
            # Also one that this very step placed: its blocks may not have been zeroed.
            self._residency.unplace(entry)
        if is_suspected:
            self.suspects.update(dict.fromkeys(sequences))
            self.suspects.update((entry, None) for entry in compiling if entry.key in in_steps)
        return not (retries or is_suspected)

    def next_suspect(self) -> Sequence | Entry | None:
        """The suspect whose turn it is; None when there is none left."""
        while self.suspects:
            suspect = next(iter(self.suspects))
            if self._is_pending(suspect):
                return suspect
            del self.suspects[suspect]
        return None

    @property
    def proving(self) -> bool:
        """Whether suspects run alone, and all others pause."""
        return any(map(self._is_pending, self.suspects))

    def _is_pending(self, suspect: Sequence | Entry) -> bool:
        if isinstance(suspect, Sequence):
            return not suspect.finished
        return self._residency.get(suspect.key) is suspect and not suspect.is_compiled
