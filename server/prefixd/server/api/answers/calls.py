"""Finds calls of tools in a growing text."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from prefixd.server.api.answers.call_reader import ArgumentsReader, CallReader, is_name
from prefixd.server.api.answers.formats import NAME_ENDS, Syntax
from prefixd.server.api.answers.held_text import Spaces, num_begun
from prefixd.server.api.answers.json_scanner import MalformedJson
from prefixd.server.api.answers.pieces import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
)

_ARGUMENTS, _CALL_ID = NAME_ENDS
_MAX_HEAD = 1024
"""Characters of a name and of the marks behind it."""


@dataclass(slots=True)
class _Call:
    """A call that is being read; ``raw`` is all of its text, with the mark before it."""

    reader: CallReader | ArgumentsReader
    raw: str
    index: int | None = None


class CallFinder:
    """Splits a growing text into content and calls in one syntax.

    What turns out to be no call before it was announced is content. ``names`` are those of the
    tools: calls without an opener are only taken for calls if they have one of them. ``limit`` is
    the number of calls after which others are dropped.
    """

    def __init__(
        self, syntax: Syntax, *, names: Collection[str] = (), limit: int | None = None
    ) -> None:
        self._syntax = syntax
        self._names = names
        self._limit = limit
        self._buffer = ""
        self._pieces: list[Piece] = []
        self._spaces = Spaces()
        self._call: _Call | None = None
        self._num_calls = 0
        self._before = ""  # marks since the last call or content, in case that no call follows
        self._closer, self._separator = syntax.closer, syntax.separator
        # What is read: one of the methods below. Each returns whether it got on.
        self._read: Callable[[], bool] = self._read_start

    def push(self, text: str) -> list[Piece]:
        """Add text. Returns what is final now."""
        self._buffer += text
        while self._buffer and self._read():
            pass
        return self._take()

    def end(self, *, is_cut: bool) -> list[Piece]:
        """The rest, at the end of the text; ``is_cut``: by a limit of tokens."""
        call, rest, self._buffer = self._call, self._buffer, ""
        if call is not None and call.index is not None:
            if not is_cut or rest:  # behind malformed JSON, the rest waits for the closer
                self._break(call, rest)
        elif call is not None:
            self._content(call.raw + rest)
        elif self._before or self._read != self._read_between or not self._closer.startswith(rest):
            self._content(self._before + rest)
        self._pieces += [Content(held)] if (held := self._spaces.end()) else []
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _content(self, text: str) -> None:
        self._before = ""
        if final := self._spaces.push(text):
            self._pieces.append(Content(final))

    def _read_start(self) -> bool:
        """Whitespace at the start, behind which a bare call may begin."""
        stripped = self._buffer.lstrip()
        if not stripped and self._syntax.bare:
            return False
        if stripped and stripped[0] in self._syntax.bare:
            self._open_list(self._buffer[: len(self._buffer) - len(stripped)])
        else:
            self._read = self._read_text
        return True

    def _open_list(self, before: str) -> None:
        """Begin calls behind the text ``before``: objects, or a list of them."""
        self._before = before
        self._buffer = self._buffer[len(before) :]
        self._closer, self._separator = self._syntax.closer, self._syntax.separator
        if self._buffer.startswith("["):
            self._before += "["
            self._buffer = self._buffer[1:]
            self._closer, self._separator = "]", ","
        self._read = self._read_between

    def _read_text(self) -> bool:
        """Content, up to an opener."""
        opener = self._syntax.opener
        if not opener:
            self._content(self._buffer)
            self._buffer = ""
            return False
        text, mark, rest = self._buffer.partition(opener)
        if mark:
            self._content(text)
            self._buffer, self._before, self._read = rest, mark, self._read_opened
            return True
        size = len(self._buffer) - num_begun(self._buffer, opener)
        self._content(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return False

    def _read_opened(self) -> bool:
        """What follows an opener: objects, a list of them, or a name."""
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        if self._syntax.names_first and stripped[0] not in "[{":
            self._read = self._read_name
            return True
        space = self._buffer[: len(self._buffer) - len(stripped)]
        self._open_list(space)
        self._before = self._syntax.opener + self._before
        return True

    def _read_name(self) -> bool:
        """A name, up to the mark of its arguments or their first brace."""
        head, brace, rest = self._buffer.partition("{")
        if not brace:
            return len(head) > _MAX_HEAD and self._no_call()
        name, _, _ = head.removesuffix(_ARGUMENTS).partition(_CALL_ID)
        if len(head) > _MAX_HEAD or not is_name(name.strip()):
            return self._no_call()
        self._call = _Call(ArgumentsReader(name.strip()), self._before + head)
        self._buffer, self._closer, self._separator = "{" + rest, "", ""
        self._read = self._read_call
        return True

    def _no_call(self) -> bool:
        """What was opened is content."""
        self._content(self._before)
        self._read = self._read_text
        return True

    def _read_between(self) -> bool:
        """Whitespace, separators and the closer around calls."""
        stripped = self._buffer.lstrip()
        if self._before:
            self._before += self._buffer[: len(self._buffer) - len(stripped)]
        self._buffer = stripped
        if not stripped:
            return False
        for mark in (self._closer, self._separator):
            if mark and self._buffer.startswith(mark):
                self._buffer = self._buffer[len(mark) :]
                if self._before:  # no call since the opener
                    self._before += mark
                    return mark == self._separator or self._no_call()
                if mark == self._closer:
                    self._read = self._read_text
                return True
            if mark and mark.startswith(self._buffer):
                return False
        if self._buffer[0] == "{":
            self._call = _Call(CallReader(), self._before)
            self._read = self._read_call
            return True
        return self._no_call()

    def _read_call(self) -> bool:
        """The characters of a call."""
        call, text = self._call, self._buffer
        assert call is not None
        for place, character in enumerate(text):
            try:
                call.reader.push(character)
                if call.index is None and call.reader.has_started:
                    self._announce(call)
            except MalformedJson:
                return self._malformed(call, text[:place], text[place:])
            if call.reader.done:
                self._arguments(call)
                self._call, self._before = None, ""
                self._buffer = text[place + 1 :]
                self._read = self._read_between
                return True
        call.raw += text
        self._buffer = ""
        self._arguments(call)
        return False

    def _announce(self, call: _Call) -> None:
        """Raises MalformedJson for what is no call after all."""
        assert call.reader.name is not None
        is_bare = self._syntax.opener not in call.raw or not self._syntax.opener
        if is_bare and self._num_calls == 0 and call.reader.name not in self._names:
            raise MalformedJson("an object that is no call")
        call.index = self._num_calls
        self._num_calls += 1
        call.raw = self._spaces.mark() + call.raw
        if self._is_kept(call.index):
            self._pieces.append(CallStart(call.index, call.reader.name))

    def _arguments(self, call: _Call) -> None:
        text = call.reader.take()
        if text and call.index is not None and self._is_kept(call.index):
            self._pieces.append(CallArguments(call.index, text))

    def _is_kept(self, index: int) -> bool:
        return self._limit is None or index < self._limit

    def _malformed(self, call: _Call, before: str, rest: str) -> bool:
        """``rest`` is malformed: all of it is content, or the rest of the arguments, whose call was
        announced."""
        call.raw += before
        if call.index is None:
            self._call = None
            self._content(call.raw)
            self._buffer, self._read = rest, self._read_text
            return True
        self._arguments(call)
        self._buffer, self._read = rest, self._read_broken
        return True

    def _read_broken(self) -> bool:
        """The rest of a call with malformed JSON, up to its closer."""
        call = self._call
        assert call is not None
        closer = self._syntax.closer
        text, mark, rest = self._buffer.partition(closer) if closer else (self._buffer, "", "")
        if mark:
            self._buffer = rest
            self._break(call, text, closer=mark)
            return True
        return False

    def _break(self, call: _Call, rest: str, *, closer: str = "") -> None:
        """End a call whose arguments are malformed."""
        assert call.index is not None
        if self._is_kept(call.index):
            self._pieces += [CallArguments(call.index, rest)] if rest else []
            self._pieces.append(CallBroken(call.index, call.raw + rest + closer))
        self._call, self._before, self._read = None, "", self._read_text
        self._spaces = Spaces()
