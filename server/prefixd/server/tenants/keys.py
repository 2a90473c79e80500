"""The format of an API key: recognisable, checkable without a database, and never stored.

::

    pfx_4f9c2hT8kQzL_<43 characters: 256 random bits><6 characters: CRC-32>
     |        |
     |        +-- key id: stored, shown in listings and logs
     +-- recognisable by secret scanners

A typing mistake fails the checksum and costs no look-up. The catalog keeps the SHA-256 of the whole
text: the secret has 256 random bits, so a slow password hash would add cost and no safety.
"""

import hashlib
import secrets
import string
import zlib
from dataclasses import dataclass

MARK = "pfx"
ID_LENGTH = 12
SECRET_LENGTH = 43
CHECK_LENGTH = 6

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_DIGITS = frozenset(_ALPHABET)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """What may be kept of a key: its id and the SHA-256 of its text (hex)."""

    key_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class GeneratedKey:
    """A fresh key. ``text`` is the secret: shown once, never stored, left out of ``repr``."""

    text: str
    parsed: ParsedKey

    def __repr__(self) -> str:
        return f"NewKey({self.parsed.key_id})"


def generate() -> GeneratedKey:
    """Make a key from 256 bits of the operating system's randomness."""
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH))
    secret = _base62(secrets.randbits(256), SECRET_LENGTH)
    body = f"{MARK}_{key_id}_{secret}"
    text = body + _checksum(body)
    return GeneratedKey(text=text, parsed=ParsedKey(key_id=key_id, digest=_digest(text)))


def parse(text: str) -> ParsedKey | None:
    """Read a key as a client sent it; None when it cannot be one (shape or checksum)."""
    match text.split("_"):
        case [mark, key_id, tail]:
            pass
        case _:
            return None
    if mark != MARK or len(key_id) != ID_LENGTH or len(tail) != SECRET_LENGTH + CHECK_LENGTH:
        return None
    if not _DIGITS.issuperset(key_id + tail):
        return None
    if _checksum(text[:-CHECK_LENGTH]) != text[-CHECK_LENGTH:]:
        return None
    return ParsedKey(key_id=key_id, digest=_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
