"""One answer as blocks: reasoning, text and calls, in the order in which the model writes them.

Shapes of answers that have a list of items or blocks are made of these. Every change of a block
comes once: it opens, grows and closes before the next one opens.
"""

import secrets
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from prefixd.server.api.answers.formats import SYNTAX
from prefixd.server.api.answers.parser import AnswerParser, AnswerSyntax
from prefixd.server.api.answers.pieces import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
    Reasoning,
)
from prefixd.server.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    PositionLogprobs,
    TokenEvent,
)

_ALPHABET = string.ascii_letters + string.digits
_ID_SIZE = 24


class BlockKind(Enum):
    """What a block is."""

    REASONING = auto()
    TEXT = auto()
    CALL = auto()


def random_id() -> str:
    """Letters and digits, so many that no other id is the same."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_ID_SIZE))


@dataclass(slots=True)
class Block:
    """Block ``index`` of an answer; ``id`` are letters and digits. ``text`` of a call is the JSON
    text of its arguments, ``name`` its function. ``positions`` are the log-probabilities of a text.
    ``is_complete`` is false while it is open, and where a limit of tokens cut it or arguments are
    not JSON: then ``raw`` is all of the call."""

    index: int
    kind: BlockKind
    name: str = ""
    id: str = field(default_factory=random_id)
    text: str = ""
    positions: list[PositionLogprobs] = field(default_factory=list)
    is_complete: bool = False
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A block begins; this one stays without text."""

    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """A block has more text."""

    block: Block
    text: str
    positions: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """A block has ended."""

    block: Block


Change = Opened | Grown | Closed


def call_id(syntax: AnswerSyntax | None, own_id: str, *, head: str) -> str:
    """The id of a call for clients: ``head`` and ``own_id``, or as many letters of it as the
    model's template wants."""
    calls = None if syntax is None else syntax.calls
    size = None if calls is None else SYNTAX[calls].id_size
    return own_id[:size] if size else head + own_id


class BlockReader:
    """Reads the events of one answer in this ``syntax`` (None: of content alone)."""

    def __init__(self, syntax: AnswerSyntax | None) -> None:
        self.blocks: list[Block] = []
        self.end: FinishEvent | None = None
        self.reasoning_tokens = 0
        self._parser = AnswerParser(syntax or AnswerSyntax())
        self._open: Block | None = None
        self._held: list[PositionLogprobs] = []

    @property
    def is_cut(self) -> bool:
        """Whether a limit of tokens ended the answer."""
        return self.end is not None and self.end.reason is FinishReason.LENGTH

    def push(self, event: Event) -> list[Change]:
        """What an event changes."""
        if isinstance(event, TokenEvent):
            was_reasoning = self._parser.is_reasoning
            pieces = self._parser.push(event.text)
            if was_reasoning or self._parser.is_reasoning:
                self.reasoning_tokens += len(event.token_ids)
            else:
                self._held += event.logprobs
            return self._changes(pieces)
        if not isinstance(event, FinishEvent):
            return []
        self.end = event
        changes = self._changes(self._parser.end(is_cut=self.is_cut))
        return [*changes, *self._close(is_complete=not self.is_cut)]

    def _changes(self, pieces: Sequence[Piece]) -> list[Change]:
        changes: list[Change] = []
        for piece in pieces:
            changes += self._piece(piece)
        if pieces:  # what is left belongs to marks or calls
            self._held = []
        return changes

    def _piece(self, piece: Piece) -> Iterable[Change]:
        match piece:
            case Content(text):
                opened = self._in(BlockKind.TEXT)
                held, self._held = tuple(self._held), []
                return [*opened, self._grow(text, held)]
            case Reasoning(text):
                return [*self._in(BlockKind.REASONING), self._grow(text)]
            case CallStart(_, name):
                closed = self._close()
                return [*closed, self._begin(BlockKind.CALL, name)]
            case CallArguments(_, text):
                return [self._grow(text)]
            case CallBroken(_, raw):
                assert self._open is not None
                self._open.raw = raw
                return self._close(is_complete=False)

    def _in(self, kind: BlockKind) -> list[Change]:
        """Make a block of this kind the open one."""
        if self._open is not None and self._open.kind is kind:
            return []
        return [*self._close(), self._begin(kind)]

    def _begin(self, kind: BlockKind, name: str = "") -> Change:
        self._open = Block(len(self.blocks), kind, name)
        self.blocks.append(self._open)
        return Opened(replace(self._open, positions=[]))

    def _grow(self, text: str, positions: tuple[PositionLogprobs, ...] = ()) -> Change:
        assert self._open is not None
        self._open.text += text
        self._open.positions += positions
        return Grown(self._open, text, positions)

    def _close(self, *, is_complete: bool = True) -> list[Change]:
        block, self._open = self._open, None
        if block is None:
            return []
        block.is_complete = is_complete
        return [Closed(block)]


def settled(blocks: Iterable[Block]) -> list[Block]:
    """The blocks of a whole answer: calls that are no JSON are text."""
    whole: list[Block] = []
    for block in blocks:
        if block.raw:
            block.kind, block.text, block.is_complete = BlockKind.TEXT, block.raw, True
        last = whole[-1] if whole else None
        if last is not None and last.kind is block.kind is BlockKind.TEXT:
            last.text += block.text
            last.positions += block.positions
            last.is_complete = block.is_complete
        else:
            block.index = len(whole)
            whole.append(block)
    return whole
