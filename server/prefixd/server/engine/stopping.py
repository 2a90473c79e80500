"""Stop strings in streamed text: nothing that may become one is let out too early."""

from dataclasses import dataclass


@dataclass(slots=True)
class StopStrings:
    """Watches a growing text for the first of several strings.

    ``push`` returns the text that may go out and the string that ended it, if one did. Text that
    could still turn into a stop string is held back; ``flush`` lets it out at the end.
    """

    strings: tuple[str, ...]
    include: bool = False
    _held: str = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take in new text."""
        if not self.strings:
            return text, None
        self._held += text
        found = [(self._held.find(s), len(s), s) for s in self.strings if s in self._held]
        if found:
            start, length, string = min(found)
            out = self._held[: start + length if self.include else start]
            self._held = ""
            return out, string
        keep = self._could_begin()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, None

    def flush(self) -> str:
        """What was held back, when no stop string came after all."""
        out, self._held = self._held, ""
        return out

    def _could_begin(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(s) for s in self.strings) - 1)
        for size in range(longest, 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self.strings):
                return size
        return 0
