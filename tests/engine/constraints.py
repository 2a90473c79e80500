"""Constraints for tests, by a function of the output so far."""

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from prefixd.server.engine.constraint import ConstraintFailed, bit_mask
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.step import Step
from prefixd.server.testing import VOCAB_SIZE

Allowed = Callable[[tuple[int, ...]], Collection[int] | None]
LETTERS = range(ord("a"), ord("z") + 1)


@dataclass
class Following:
    """The progress of one output, under any constraint by a function."""

    allowed_after: Allowed
    output: list[int] = field(default_factory=list)

    def advance(self, token_ids: Iterable[int]) -> None:
        self.output += token_ids

    def allowed(self, banned: Collection[int]) -> bytes | None:
        ids = self.allowed_after(tuple(self.output))
        if ids is None:
            return None
        left = set(ids) - set(banned)
        if not left:
            raise ConstraintFailed("no token may follow")
        return bit_mask(left, num_ids=VOCAB_SIZE)


@dataclass
class Rule:
    """A Constraint: ``allowed_after(output)`` may follow an output; None: it is complete.
    ``outputs`` are those it was asked for."""

    allowed_after: Allowed
    outputs: list[tuple[int, ...]] = field(default_factory=list)

    def start(self, ends: Collection[int]) -> Following:
        del ends
        return Following(self._note)

    def mask(self, output: Items[int]) -> bytes | None:
        """What may follow an output."""
        return Following(self.allowed_after, list(output)).allowed(())

    def _note(self, output: tuple[int, ...]) -> Collection[int] | None:
        self.outputs.append(output)
        return self.allowed_after(output)


def alternating() -> Rule:
    """The parity of the last token decides which letters may follow."""

    def allowed_after(output: tuple[int, ...]) -> Collection[int]:
        return set(LETTERS) - set(range(ord("a") + sum(output[-1:]) % 2, ord("z"), 2))

    return Rule(allowed_after)


def masks(scheduler: Scheduler, step: Step) -> Mapping[int, bytes]:
    """The masks of a step, computed now."""
    found = {}
    for sequence in scheduler.sequences():
        constraint = sequence.request.constraint
        if sequence.seq_id in step.masked and constraint is not None:
            progress = constraint.start(())
            progress.advance(sequence.tokens[sequence.num_prompt :])
            mask = progress.allowed(())
            assert mask is not None
            found[sequence.seq_id] = mask
    return found
