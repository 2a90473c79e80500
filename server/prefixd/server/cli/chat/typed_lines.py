"""Lines typed at a prompt, edited with the system's readline, and their history in a file.

The standard library's readline gives what a chat needs: arrows, Ctrl-R, the keys of the user's
``.inputrc``, and pasted text with line breaks as one line. Where Python has none (Windows), the
console edits the line.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

try:
    import readline
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

MAX_LINES = 1000


def history_file() -> Path:
    """Where typed lines are kept: ``prefixd/chat_history`` in the user's folder of states."""
    states = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(states) / "prefixd" / "chat_history"


class TypedLines:
    """Reads lines from the terminal. ``file`` None keeps their history in memory; ``words`` are
    offered at Tab."""

    def __init__(self, file: Path | None, words: Callable[[], Sequence[str]]) -> None:
        self._file = file
        self._words = words
        self._last = ""
        if readline is not None:
            readline.set_auto_history(False)
            readline.set_completer_delims(" ")
            readline.set_completer(self._completion)
            readline.parse_and_bind("tab: complete")
            for line in _stored(file):
                readline.add_history(line)

    def read(self, prompt: str, *, is_colored: bool) -> str:
        """The next line. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
        line = input(_styled(prompt) if is_colored else prompt)
        if line.strip() and line != self._last:
            self._last = line
            if readline is not None:
                readline.add_history(line)
            with suppress(OSError):  # a history is a convenience
                self._store(line)
        return line

    def _completion(self, start: str, number: int) -> str | None:
        matching = [word for word in self._words() if word.startswith(start)]
        return f"{matching[number]} " if number < len(matching) else None

    def _store(self, line: str) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            if sys.platform != "win32":
                os.fchmod(descriptor, 0o600)  # also one that was made by other means
            file.write(json.dumps(line) + "\n")


def _stored(file: Path | None) -> list[str]:
    """The lines of earlier chats, the oldest first; a long file is cut to its last lines."""
    lines: list[str] = []
    if file is None:
        return lines
    with suppress(OSError, UnicodeDecodeError):
        written = file.read_text(encoding="utf-8").splitlines()
        for text in written[-MAX_LINES:]:
            with suppress(ValueError):
                line = json.loads(text)
                lines += [line] if isinstance(line, str) and "\0" not in line else []
        if len(written) > 2 * MAX_LINES:
            shorter = file.with_name(f"{file.name}.new")
            shorter.touch(mode=0o600)
            shorter.write_text("\n".join(written[-MAX_LINES:]) + "\n", encoding="utf-8")
            shorter.replace(file)
    return lines


def _styled(prompt: str) -> str:
    """``prompt`` in color, with marks that tell readline which characters have no width."""
    if readline is None or "libedit" in (readline.__doc__ or ""):
        return prompt
    return f"\x01\x1b[1;36m\x02{prompt.rstrip()}\x01\x1b[0m\x02 "
