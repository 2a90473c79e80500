"""Stop strings: the first one in a growing text ends it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from prefixd.server.engine.detokenizer import TokenText


@dataclass(slots=True)
class StopStrings:
    """Watches a growing text for the first of several strings.

    Text that could still become a stop string is held back, so that no part of one is sent. Special
    tokens are no part of the text, but a stop string may contain them, whole: it is also looked for
    in the text with special tokens written out.
    """

    strings: tuple[str, ...]
    include: bool = False
    _held: str = ""
    # The end of the written-out text, from where a stop string with a special token may begin, and
    # where the special tokens are in it. Empty while there is none.
    _written: str = ""
    _special: list[tuple[int, int]] = field(default_factory=list)
    # Characters of the text since the last special token.
    _num_plain: int = 0

    @property
    def longest(self) -> int:
        """Length of the longest stop string."""
        return max(map(len, self.strings), default=0)

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns the text that is final now, and the stop string that ended it."""
        self._held += text
        self._num_plain += len(text)
        if self._special:
            self._written += text
        return self._final()

    def push_special(self, text: str) -> tuple[str, str | None]:
        """Add the text of a special token. Returns as ``push`` does."""
        if any(text in string for string in self.strings):
            if not self._special:
                self._written = self._held[max(0, len(self._held) - self._num_plain) :]
            begin = len(self._written)
            self._written += text
            self._special.append((begin, begin + len(text)))
        else:  # no stop string reaches across it
            self._written, self._special = "", []
        self._num_plain = 0
        return self._final()

    def push_tokens(self, tokens: Sequence[TokenText]) -> tuple[str, str | None]:
        """Add the texts of tokens. Returns as ``push`` does; what follows a stop string is not
        added."""
        final, part = "", ""
        for token in tokens:
            part += token.text
            if token.special:
                text, stop = self.push(part)
                final, part = final + text, ""
                if stop is None:
                    text, stop = self.push_special(token.special)
                    final += text
                if stop is not None:
                    return final, stop
        text, stop = self.push(part)
        return final + text, stop

    def would_end(self, tokens: Sequence[TokenText]) -> bool:
        """Whether a stop string is complete if ``tokens`` are added. ``tokens`` of at least
        ``reach`` may be the last ones of more."""
        if not tokens:
            return False
        if len(tokens) < self.reach:
            preview = replace(self, _special=[*self._special])
        else:
            preview = StopStrings(self.strings)
        return preview.push_tokens(tokens)[1] is not None

    @property
    def reach(self) -> int:
        """Tokens that hold at least the characters of any stop string: one may take four."""
        return 4 * self.longest

    def flush(self) -> str:
        """The text held back, when no stop string came after all."""
        text, self._held = self._held, ""
        return text

    def _final(self) -> tuple[str, str | None]:
        """Remove the text that is final; the stop string that ended it, if one is complete."""
        matches = [(self._held.find(s), len(s), s) for s in self.strings if s in self._held]
        if self._special:
            starts = [(self._find_written(s), len(s), s) for s in self.strings]
            matches += [(self._start(at), size, s) for at, size, s in starts if at >= 0]
        if matches:
            start, _, string = min(matches)
            final = self._held[:start]
            self._held, self._written, self._special = "", "", []
            return final + string if self.include else final, string
        num_held_back = self._num_begun(self._held)
        if self._special:
            self._trim_written()
            num_held_back = max(num_held_back, len(self._held) - self._start(0))
        split = len(self._held) - num_held_back
        final, self._held = self._held[:split], self._held[split:]
        return final, None

    def _num_begun(self, text: str) -> int:
        """Length of the longest end of a text that begins a stop string."""
        longest = min(len(text), self.longest - 1)
        for size in range(longest, 0, -1):
            if any(s.startswith(text[-size:]) for s in self.strings):
                return size
        return 0

    def _find_written(self, string: str) -> int:
        """Where ``string`` begins in the written-out text, or -1; not inside a special token."""
        start = self._written.find(string)
        while start >= 0 and (self._is_inside(start) or self._is_inside(start + len(string))):
            start = self._written.find(string, start + 1)
        return start

    def _is_inside(self, index: int) -> bool:
        return any(first < index < last for first, last in self._special)

    def _start(self, index: int) -> int:
        """Where the written-out text from ``index`` on begins in the held text."""
        inside = sum(last - first for first, last in self._special if first >= index)
        return len(self._held) - (len(self._written) - index - inside)

    def _trim_written(self) -> None:
        """Shorten the written-out text to the longest end that begins a stop string; to nothing if
        that has no special token."""
        size = self._num_begun(self._written)
        while self._is_inside(len(self._written) - size):
            size = self._num_begun(self._written[len(self._written) - size + 1 :])
        cut = len(self._written) - size
        self._special = [(first - cut, last - cut) for first, last in self._special if first >= cut]
        self._written = self._written[cut:] if self._special else ""
