"""What each token of a tokenizer decodes to: text, bytes, or the name of a special token."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

# Decoders under which the text of a token depends on no other token, but for the first of a text.
_INDEPENDENT = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "None"}


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each letter in which byte-level tokenizers write it (GPT-2's bytes_to_unicode):
    visible ones as themselves, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [byte for byte in range(0x100) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(invisible)}


_ALPHABET = _byte_level_alphabet()


class TokenTable:
    """What each token of a tokenizer decodes to. Shared by all sequences and threads.

    ``is_byte_level``: tokens are bytes, in the alphabet of GPT-2.
    """

    def __init__(self, backend: Any) -> None:
        """``backend`` is the fast tokenizer of the ``tokenizers`` package."""
        self._backend = backend
        self._special: dict[int, str] = {
            token_id: token.content
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        kinds = set(_decoder_kinds(backend.decoder))
        self.is_byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self._byte_tokens = _byte_tokens(backend) if "ByteFallback" in kinds else {}
        self._is_independent = kinds <= _INDEPENDENT
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str] = {}

    def special(self, token_id: int) -> str:
        """Text of a special token; empty for any other."""
        return self._special.get(token_id, "")

    def has_text(self, token_id: int) -> bool:
        """Whether a token is part of a text: not special, and known to the tokenizer (embeddings
        may have more rows)."""
        return token_id not in self._special and self._backend.id_to_token(token_id) is not None

    def byte(self, token_id: int) -> int | None:
        """The byte of a byte token (``<0x0A>``); None for any other."""
        return self._byte_tokens.get(token_id)

    def bytes_of(self, run: Sequence[int]) -> bytes:
        """The bytes of byte tokens."""
        return bytes(self._byte_tokens[token_id] for token_id in run)

    def byte_level(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer."""
        raw = self._bytes.get(token_id)
        if raw is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                raw = bytes(_ALPHABET[letter] for letter in token)
            except KeyError:  # an added token, which is text
                raw = token.encode()
            self._bytes[token_id] = raw
        return raw

    def piece(self, token_id: int, previous: int | None) -> str:
        """Text of a token after ``previous``, the token with text before it; None: the first."""
        if previous is None:
            return self.text([token_id], None)
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self.text([token_id], previous)
            if self._is_independent:
                self._pieces[token_id] = piece
        return piece

    def text(self, token_ids: Sequence[int], previous: int | None) -> str:
        """Text of tokens after ``previous``, as of ``piece``."""
        before = [] if previous is None else [previous]
        return self._decode([*before, *token_ids])[len(self._decode(before)) :]

    def raw(self, token_id: int, previous: int | None) -> bytes | None:
        """The bytes of a token after ``previous``; those of its name for a special token. None for
        an id without a token."""
        if token_id in self._special:
            return self._special[token_id].encode()
        if self._backend.id_to_token(token_id) is None:
            return None
        if self.is_byte_level:
            return self.byte_level(token_id)
        byte = self.byte(token_id)
        if byte is None or (previous is None and byte == ord(" ")):  # which may be dropped
            return self.piece(token_id, previous).encode()
        return bytes([byte])

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text


def _byte_tokens(backend: Any) -> dict[int, int]:
    """The bytes that a vocabulary has tokens for, by token id."""
    names = {name: byte for byte in range(256) for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>")}
    ids = {backend.token_to_id(name): byte for name, byte in names.items()}
    return {token_id: byte for token_id, byte in ids.items() if token_id is not None}


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    """Names of the steps of a decoder of the ``tokenizers`` package."""
    if decoder is None:
        yield "None"
        return
    state = json.loads(decoder.__getstate__())
    for step in state.get("decoders", [state]):
        yield step["type"]
