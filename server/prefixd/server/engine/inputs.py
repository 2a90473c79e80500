"""Embeddings in a prompt: rows that take the place of prompt tokens. Plain data, no torch.

::

    prompt    a  b  *  *  *  c      * is PLACEHOLDER
    inputs    InputRun(2, payload)  of three rows
    a chunk of positions 1 .. 4     tokens b * *, inputs InputPart(1, payload, 0, 2)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

PLACEHOLDER = -2
"""In a prompt in place of a token whose embedding is given. No token has this id: it is neither
sampled nor shown, penalised or proposed."""


class Embeddings(Protocol):
    """Rows of input embeddings in host memory, or tokens of a prefix in place of them.

    The engine counts and names them; the values are private to their source and the runner. Equal
    names mean equal rows, within a tenant and its base: KV reuse relies on it.
    """

    @property
    def num_rows(self) -> int: ...

    @property
    def name(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class InputRun:
    """The rows of ``payload`` take the place of the prompt tokens from ``place`` on."""

    place: int
    payload: Embeddings

    @property
    def stop(self) -> int:
        """The place behind its last row."""
        return self.place + self.payload.num_rows


class InputPart(NamedTuple):
    """Rows ``start .. stop`` of ``payload``, from token ``offset`` of a chunk on."""

    offset: int
    payload: Embeddings
    start: int
    stop: int

    @property
    def name(self) -> bytes:
        """What these rows are, and where: equal names mean equal input."""
        return b"%d:%d:%d:" % (self.offset, self.start, self.stop) + self.payload.name


def check_runs(runs: Sequence[InputRun], prompt: Sequence[int]) -> None:
    """Assert that ``runs`` cover exactly the placeholders of a prompt, in order."""
    covered = [place for run in runs for place in range(run.place, run.stop)]
    placeholders = [place for place, token in enumerate(prompt) if token == PLACEHOLDER]
    assert covered == placeholders, f"runs at {covered} for placeholders at {placeholders}"


def parts_within(runs: Iterable[InputRun], start: int, stop: int) -> Iterator[InputPart]:
    """The rows of ``runs`` for the prompt tokens ``start .. stop``; offsets from ``start`` on."""
    for run in runs:
        first, last = max(start, run.place), min(stop, run.stop)
        if first < last:
            yield InputPart(first - start, run.payload, first - run.place, last - run.place)


def num_rows_before(runs: Iterable[InputRun], stop: int) -> int:
    """Rows among the first ``stop`` prompt tokens."""
    return sum(part.stop - part.start for part in parts_within(runs, 0, stop))
