"""From the text of an answer to its pieces: reasoning, content and calls."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from prefixd.server.api.answers.calls import CallFinder
from prefixd.server.api.answers.formats import SYNTAX, CallFormat
from prefixd.server.api.answers.pieces import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
    Reasoning,
)
from prefixd.server.api.answers.reasoning import END_THINK, THINK, ReasoningSplitter


@dataclass(frozen=True, slots=True)
class AnswerSyntax:
    """What to look for in an answer.

    ``calls`` is the format of calls of the tools ``names``, None without tools; ``max_calls``
    limits them. ``reasons``: text between the marks of thinking is reasoning; ``is_reasoning``: the
    prompt ends with the first of them; ``shows_reasoning``: it is part of the response.
    """

    calls: CallFormat | None = None
    names: Collection[str] = ()
    max_calls: int | None = None
    reasons: bool = False
    is_reasoning: bool = False
    shows_reasoning: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that are looked for, which may be special tokens."""
        marks = (THINK, END_THINK) if self.reasons else ()
        return marks if self.calls is None else (*marks, *SYNTAX[self.calls].marks)


class AnswerParser:
    """Splits the growing text of one answer."""

    def __init__(self, syntax: AnswerSyntax) -> None:
        self._splitter = ReasoningSplitter(is_open=syntax.is_reasoning) if syntax.reasons else None
        self._shows_reasoning = syntax.shows_reasoning
        self._finder = (
            None
            if syntax.calls is None
            else CallFinder(SYNTAX[syntax.calls], names=syntax.names, limit=syntax.max_calls)
        )

    @property
    def is_reasoning(self) -> bool:
        """Whether what was added last is reasoning."""
        return self._splitter is not None and self._splitter.is_thinking

    def push(self, text: str) -> list[Piece]:
        """Add text. Returns the pieces that are final now."""
        reasoning, text = self._splitter.push(text) if self._splitter else ("", text)
        return [*self._reasoning(reasoning), *self._find(text)]

    def end(self, *, is_cut: bool) -> list[Piece]:
        """The rest, at the end of the text; ``is_cut``: by a limit of tokens."""
        reasoning, text = self._splitter.end() if self._splitter else ("", "")
        pieces = [*self._reasoning(reasoning), *self._find(text)]
        return pieces + (self._finder.end(is_cut=is_cut) if self._finder else [])

    def _reasoning(self, text: str) -> list[Piece]:
        return [Reasoning(text)] if text and self._shows_reasoning else []

    def _find(self, text: str) -> list[Piece]:
        if self._finder is not None:
            return self._finder.push(text)
        return [Content(text)] if text else []


@dataclass(slots=True)
class ParsedAnswer:
    """A whole answer. ``calls`` are names and the JSON texts of arguments."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)


def assembled(pieces: Iterable[Piece]) -> ParsedAnswer:
    """The answer of these pieces; calls that are no JSON are content."""
    answer = ParsedAnswer()
    calls: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                answer.content += text
            case Reasoning(text):
                answer.reasoning += text
            case CallStart(index, name):
                calls[index] = (name, "")
            case CallArguments(index, text):
                name, before = calls[index]
                calls[index] = (name, before + text)
            case CallBroken(index, raw):
                del calls[index]
                answer.content += raw
    answer.calls = list(calls.values())
    return answer


def parse(text: str, syntax: AnswerSyntax, *, is_cut: bool = False) -> ParsedAnswer:
    """A text that is complete."""
    parser = AnswerParser(syntax)
    return assembled([*parser.push(text), *parser.end(is_cut=is_cut)])
