"""Constraints: what the output of a request may be, and what of it is asked of a model. Plain data.

::

    Grammar ──compile──> Constraint ──start──> Progress of one sequence ──allowed──> bit mask
             (model)     (shared)              (advanced by its tokens)              (to the runner)

A bit mask is ``bytes``: id ``i`` may follow where bit ``i % 8`` (from the lowest) of byte
``i // 8`` is set. Ids behind its end may not.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

CONSTRAINT_FAILED = "constraint_failed"
"""The code of an output that cannot be continued under its constraint."""


class GrammarKind(StrEnum):
    """What the text of a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language that an output must be in, as text: two that are equal compile to the same.

    ``source`` is a JSON Schema (as JSON), a regular expression that the whole output matches, a
    JSON list of texts of which it is one, or a grammar in llguidance's dialect of Lark, in which
    special tokens of the model are written as they are (``<|im_end|>``). ``any_whitespace`` allows
    whitespace between the parts of JSON; without it there is none. ``schemas`` are the JSON Schemas
    that a grammar in Lark was made of, each behind its place in the request.
    """

    kind: GrammarKind
    source: str
    any_whitespace: bool = False
    schemas: tuple[tuple[str, str], ...] = ()


class GrammarRefused(Exception):
    """A grammar cannot be used; the message says where and why, in one line. ``over_limit``: it
    needs more time or memory than one may."""

    def __init__(self, message: str, *, over_limit: bool = False) -> None:
        super().__init__(message)
        self.message, self.over_limit = message, over_limit


class ConstraintFailed(Exception):
    """An output cannot be continued under its constraint; the message is for the caller."""


class Progress(Protocol):
    """Follows the output of one sequence. Called by one thread at a time."""

    def advance(self, token_ids: Iterable[int]) -> None:
        """Take in the next tokens of the output. Raises ConstraintFailed."""
        ...

    def allowed(self, banned: Collection[int]) -> bytes | None:
        """The ids that may follow, as a bit mask, without those that are ``banned``; None where
        the output is complete and nothing can follow. Raises ConstraintFailed where nothing can
        follow an output that is not complete."""
        ...


class Constraint(Protocol):
    """What outputs must be. Shared by sequences and threads."""

    def start(self, ends: Collection[int]) -> Progress:
        """The progress of a new output. The ids in ``ends`` may follow where it is complete, and
        end it then."""
        ...


class GrammarCompiler(Protocol):
    """Makes constraints of grammars, for one model. Called on any thread."""

    def compile(self, grammar: Grammar) -> Constraint:
        """Raises GrammarRefused. Takes a bounded time and memory, most of them in a process of its
        own."""
        ...

    def close(self) -> None:
        """End the processes that it started; a later ``compile`` starts new ones."""
        ...


def bit_mask(token_ids: Iterable[int], *, num_ids: int) -> bytes:
    """The bit mask of these ids, of ``num_ids``."""
    mask = bytearray(-(-num_ids // 32) * 4)
    for token_id in token_ids:
        mask[token_id >> 3] |= 1 << (token_id & 7)
    return bytes(mask)


def is_allowed(mask: bytes, token_id: int) -> bool:
    """Whether a bit mask has an id."""
    return token_id >> 3 < len(mask) and bool(mask[token_id >> 3] >> (token_id & 7) & 1)
