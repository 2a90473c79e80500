"""A terminal for tests: what a person sees on it and above it, from the bytes it is sent."""

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

from rich.cells import cell_len
from rich.console import Console

_PIECES = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """``lines`` are all lines from the first to the last one written, those that left the screen at
    its top included, which no sequence reaches any more. A line wraps at ``width``.

    Understands what rich's Live sends; any other sequence is an error.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.lines = [""]
        self._row = 0
        self._column = 0
        self.file = StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=True,
            width=width,
            height=height,
            color_system="256",
            legacy_windows=False,
            _environ={},
        )

    @property
    def text(self) -> str:
        """Everything written, without spaces at the ends of lines."""
        self.feed(self.file.getvalue())
        self.file.seek(0)
        self.file.truncate()
        return "\n".join(line.rstrip() for line in self.lines).rstrip()

    def feed(self, data: str) -> None:
        """Show ``data``."""
        end = 0
        for piece in _PIECES.finditer(data):
            assert piece.start() == end, f"not understood: {data[end : end + 20]!a}"
            end = piece.end()
            parameter, final, control, text = piece.groups()
            if final:
                self._sequence(parameter, final)
            elif control == "\r":
                self._column = 0
            elif control == "\n":
                self._down()
            else:
                self._put(text)
        assert end == len(data), f"not understood: {data[end : end + 20]!a}"

    def _sequence(self, parameter: str, final: str) -> None:
        actions: dict[str, Callable[[], Any]] = {
            "m": lambda: None,
            "h": lambda: None,
            "l": lambda: None,
            "A": lambda: self._up(int(parameter or 1)),
            "K": self._erase,
        }
        actions[final]()

    def _erase(self) -> None:
        self.lines[self._row] = ""

    def _up(self, count: int) -> None:
        top = max(0, len(self.lines) - self.height)
        self._row = max(top, self._row - count)

    def _down(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self.lines):
            self.lines.append("")

    def _put(self, text: str) -> None:
        line = self.lines[self._row]
        assert self._column or not line, f"would overwrite {line!r}"
        if cell_len(line + text) <= self.width:
            self.lines[self._row] = line + text
        elif len(text) > 1:
            for character in text:
                self._put(character)
        else:
            self._down()
            self.lines[self._row] = text
        self._column = 1
