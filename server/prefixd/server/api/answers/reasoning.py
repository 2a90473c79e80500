"""Separates what a model thinks from what it answers: ``<think>…</think>`` at the start."""

from enum import Enum, auto

from prefixd.server.api.answers.held_text import Spaces, num_begun

THINK, END_THINK = "<think>", "</think>"


class _State(Enum):
    START = auto()
    THINKING = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Splits a growing text. ``is_open``: the prompt ends with the start mark.

    Whitespace next to the marks is dropped. A mark later in the text is text.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._is_open = is_open
        self._state = _State.START
        self._buffer = ""
        self._spaces = Spaces(after_mark=True)
        self._skips = False

    @property
    def is_thinking(self) -> bool:
        """Whether what was added last is reasoning."""
        return self._state is _State.THINKING

    def push(self, text: str) -> tuple[str, str]:
        """Add text. Returns the reasoning and the answer that are final now."""
        if self._state is _State.ANSWER:
            return "", self._answer(text)
        self._buffer += text
        if self._state is _State.START:
            self._begin()
        return self._read()

    def _read(self) -> tuple[str, str]:
        match self._state:
            case _State.START:
                return "", ""
            case _State.ANSWER:
                return "", self._answer(self._take())
            case _State.THINKING:
                return self._think()

    def _think(self) -> tuple[str, str]:
        """Reasoning, up to the end mark."""
        reasoning, mark, rest = self._buffer.partition(END_THINK)
        if mark:
            self._state, self._skips, self._buffer = _State.ANSWER, True, ""
            return self._spaces.push(reasoning), self._answer(rest)
        size = len(self._buffer) - num_begun(self._buffer, END_THINK)
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return self._spaces.push(text), ""

    def end(self) -> tuple[str, str]:
        """The rest, at the end of the text."""
        rest = self._take()
        if self._state is _State.THINKING or (self._state is _State.START and self._is_open):
            return self._spaces.push(rest) + self._spaces.end(), ""
        return "", rest

    def _begin(self) -> None:
        """Leave the start, if it is sure what comes."""
        stripped = self._buffer.lstrip()
        if stripped.startswith(THINK):
            self._state, self._buffer = _State.THINKING, stripped[len(THINK) :]
        elif not THINK.startswith(stripped):
            self._state = _State.THINKING if self._is_open else _State.ANSWER

    def _answer(self, text: str) -> str:
        """Text of the answer, without the whitespace before its start."""
        if self._skips:
            text = text.lstrip()
            self._skips = not text
        return text

    def _take(self) -> str:
        rest, self._buffer = self._buffer, ""
        return rest
