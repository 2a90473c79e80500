"""Text that is passed on as soon as it is sure not to be part of a mark."""


def num_begun(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that begins ``mark`` and is shorter than it."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


class Spaces:
    """Passes text on, and holds the whitespace at its end: next to a mark it is dropped.

    ``after_mark``: whitespace at the start is dropped too.
    """

    def __init__(self, *, after_mark: bool = False) -> None:
        self._drops = after_mark
        self._held = ""

    def push(self, text: str) -> str:
        """Add text. Returns what can be passed on."""
        if self._drops:
            text = text.lstrip()
            if not text:
                return ""
            self._drops = False
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def mark(self) -> str:
        """A mark comes here. Returns the whitespace that is dropped before it."""
        held, self._held, self._drops = self._held, "", True
        return held

    def end(self) -> str:
        """The text ends here: the whitespace that was held."""
        held, self._held = self._held, ""
        return held
