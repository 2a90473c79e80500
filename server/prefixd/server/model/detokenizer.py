"""Token ids to text, incrementally: what prompt and output decode to, less the prompt's text.

A token's text depends on what comes before it: SentencePiece tokenizers drop the space in front of
the first word of a text, WordPiece puts one between words. So a text is decoded as the continuation
of its prompt. Characters that are split over tokens have no text until they are complete; in a
tokenizer with byte fallback a run of byte tokens becomes text only as a whole, because one invalid
byte turns all of them into replacement characters. A long run becomes text by its characters once
it has ``MAX_HELD_BYTES``: an answer written in bytes alone has to be streamed.
"""

import codecs
from collections.abc import Callable, Sequence

from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.model.token_table import TokenTable

# 85 characters of three bytes. An invalid byte behind them leaves those before it as they are.
MAX_HELD_BYTES = 256

_REPLACEMENT = "\ufffd"


class ByteLevelDetokenizer:
    """Decodes tokens that are bytes. A character belongs to the token that completes it."""

    previous = None  # no token depends on another

    def __init__(self, table: TokenTable, prompt: Sequence[int]) -> None:
        self._table = table
        self.special = table.special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Special tokens in the middle of a character.
        self._specials: list[str] = []
        end = b""
        for token_id in reversed(prompt):
            if len(end) >= 3:  # as much as an incomplete character has
                break
            if not table.special(token_id):
                end = table.byte_level(token_id) + end
        self._decode(end)
        # The prompt's text ends with a replacement character, unless the output completes it.
        self._is_prompt_open = self._is_open

    @property
    def _is_open(self) -> bool:
        """Whether the last character is incomplete."""
        return bool(self._decoder.getstate()[0])

    def _decode(self, raw: bytes) -> str:
        text = self._decoder.decode(raw)
        pending = self._decoder.getstate()[0]
        if pending[:1] == b"\xed" and pending[1:] >= b"\xa0":
            # Half of a surrogate is no character. The codec waits for the rest only for the sake of
            # its error handler surrogatepass.
            text += self._decoder.decode(b"", final=True)
        return text

    def push(self, token_id: int) -> Sequence[TokenText]:
        """See Detokenizer."""
        special = self._table.special(token_id)
        if special:
            if not self._is_open:
                return (TokenText("", special),)
            self._specials.append(special)
            return ()
        raw = self._table.byte_level(token_id)
        if not self._is_open:
            return (TokenText(self._decode(raw)),)
        text, lead = self._continue(raw)
        tokens = [TokenText("", special) for special in self._specials]
        self._specials.clear()
        return (*tokens, TokenText(text, lead=lead))

    def _continue(self, raw: bytes) -> tuple[str, int]:
        """Decode bytes after an incomplete character. Returns their text, and its length in front
        of them: 1 if they do not continue that character."""
        text = self._decode(raw[:1])
        # A complete character is one, and leaves nothing open; a broken one is followed by more.
        lead = int(text[:1] == _REPLACEMENT and (len(text) > 1 or self._is_open))
        text += self._decode(raw[1:])
        if text and self._is_prompt_open:
            self._is_prompt_open = False
            if text[0] == _REPLACEMENT:  # it is in the prompt's text already
                return text[1:], 0
        return text, lead

    def tentative(self, limit: int) -> Sequence[TokenText]:
        """See Detokenizer."""
        if not self._specials:
            return ()
        specials = [TokenText("", special) for special in self._specials[-limit:]]
        broken = TokenText("" if self._is_prompt_open else _REPLACEMENT)
        return [broken, *specials][-limit:]

    def flush(self) -> Sequence[TokenText]:
        """See Detokenizer."""
        text = self._decoder.decode(b"", final=True)
        if self._is_prompt_open:
            text, self._is_prompt_open = "", False
        first, *others = self._specials or [""]
        self._specials = []
        return (
            TokenText(text, first, lead=len(text)),
            *(TokenText("", special) for special in others),
        )


class _ByteRun:
    """A run of byte tokens, which the special tokens in it do not interrupt.

    It is text if all of its bytes are valid UTF-8, otherwise each becomes a replacement character.
    From ``MAX_HELD_BYTES`` on, the characters that are complete are final.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0
        # Its tokens that are not final, as text and as invalid bytes.
        self._valid: list[TokenText] = []
        self._invalid: list[TokenText] = []
        self._is_valid = True
        # Bytes of the prompt that its text does not show as so many characters.
        self._num_unshown = 0

    @property
    def _is_open(self) -> bool:
        """Whether the last character is incomplete."""
        return bool(self._decoder.getstate()[0])

    def begin(self, prompt: bytes, text: str) -> None:
        """Begin with the bytes at the end of a prompt; ``text`` is what its text shows of them."""
        try:
            self._decoder.decode(prompt)
        except UnicodeDecodeError:
            self._is_valid = False
        else:
            self._num_unshown = 0 if self._is_open else len(prompt) - len(text)

    def push_special(self, special: str) -> Sequence[TokenText]:
        """Add a token without text. Returns the tokens that are final."""
        token = TokenText("", special)
        if not self._is_valid:
            return (token,)
        self._valid.append(token)
        self._invalid.append(token)
        return ()

    def push(self, byte: int, text: Callable[[str], str] = str) -> Sequence[TokenText]:
        """Add a byte. Returns the tokens that are final."""
        lead, self._num_unshown = self._num_unshown, 0
        token = TokenText(_REPLACEMENT * (1 + lead), lead=lead)
        if not self._is_valid:
            return (token,)
        self._invalid.append(token)
        self._num_bytes += 1
        try:
            self._valid.append(TokenText(text(self._decoder.decode(bytes([byte])))))
        except UnicodeDecodeError:
            self._is_valid = False
            return self._invalid
        if self._num_bytes < MAX_HELD_BYTES or self._is_open:
            return ()
        final, self._valid, self._invalid = self._valid, [], []
        return final

    def tentative(self, limit: int) -> Sequence[TokenText]:
        """The last ``limit`` tokens that are not final but have a text."""
        if not self._is_valid or not self._valid:
            return ()
        if not self._is_open:
            return self._valid[-limit:]
        return self._invalid[-limit:] if self._valid[-1].special else ()

    def end(self) -> Sequence[TokenText]:
        """The tokens that were not final, now that the run has ended."""
        if not self._is_valid:
            return ()
        return self._invalid if self._is_open else self._valid


class PieceDetokenizer:
    """Decodes tokens that are pieces of text, or single bytes where the vocabulary has no piece."""

    def __init__(self, table: TokenTable, prompt: Sequence[int]) -> None:
        self._table = table
        self.special = table.special
        self.previous: int | None = None
        self._run: _ByteRun | None = None
        before: int | None = None
        run: list[int] = []
        for token_id in reversed(prompt):
            if not table.has_text(token_id):
                continue
            if self.previous is None:
                self.previous = token_id
            if table.byte(token_id) is None:
                before = token_id
                break
            run.append(token_id)
        if run:
            run.reverse()
            self._run = _ByteRun()
            self._run.begin(table.bytes_of(run), table.text(run, before))

    def push(self, token_id: int) -> Sequence[TokenText]:
        """See Detokenizer."""
        table = self._table
        if not table.has_text(token_id):
            special = table.special(token_id)
            return (
                (TokenText("", special),) if self._run is None else self._run.push_special(special)
            )
        byte, previous, self.previous = table.byte(token_id), self.previous, token_id
        if byte is None:
            token = TokenText(table.piece(token_id, previous))
            return (token,) if self._run is None else (*self.flush(), token)
        if self._run is None:
            self._run = _ByteRun()
        if previous is None and byte == ord(" "):  # at the start of a text it may be dropped
            return self._run.push(byte, lambda _: table.piece(token_id, None))
        return self._run.push(byte)

    def tentative(self, limit: int) -> Sequence[TokenText]:
        """See Detokenizer."""
        return () if self._run is None else self._run.tentative(limit)

    def flush(self) -> Sequence[TokenText]:
        """See Detokenizer."""
        run, self._run = self._run, None
        return () if run is None else run.end()


def new_detokenizer(
    table: TokenTable, prompt: Sequence[int]
) -> ByteLevelDetokenizer | PieceDetokenizer:
    """The detokenizer of a sequence that begins with ``prompt``."""
    kind = ByteLevelDetokenizer if table.is_byte_level else PieceDetokenizer
    return kind(table, prompt)
