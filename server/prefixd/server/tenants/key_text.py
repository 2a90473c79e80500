"""The text of an API key, and its parts.

::

    pfx_4f9c2hT8kQzL_<43 characters: 256 random bits><6 characters: CRC-32>
     |        |
     |        +-- key id: stored, shown in listings and logs
     +-- recognisable by secret scanners

A typing mistake fails the checksum and costs no lookup. The catalog stores the SHA-256 of the
whole text: the secret has 256 random bits, so a slow password hash would add cost and no safety.
"""

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

MARK = "pfx"
ID_LENGTH = 12
SECRET_LENGTH = 43
CHECK_LENGTH = 6

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_DIGITS = frozenset(_ALPHABET)

_LIKE_A_KEY = re.compile(rf"{MARK}_[0-9A-Za-z]{{6,}}_[0-9A-Za-z]{{8,}}")


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """The stored parts of a key: its id and the SHA-256 of its text (hex)."""

    key_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class GeneratedKey:
    """A new key. ``text`` is the secret: shown once, never stored, left out of ``repr``."""

    text: str = field(repr=False)
    parsed: ParsedKey


def generate() -> GeneratedKey:
    """Make a key from 256 bits of the operating system's randomness."""
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH))
    body = f"{MARK}_{key_id}_{_base62(secrets.randbits(256), SECRET_LENGTH)}"
    text = body + _checksum(body)
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    return GeneratedKey(text=text, parsed=ParsedKey(key_id=key_id, digest=digest))


def parse(text: str) -> ParsedKey | None:
    """Read a key as a client sent it; None when it cannot be one (shape or checksum)."""
    mark, _, rest = text.partition("_")
    key_id, _, tail = rest.partition("_")
    if mark != MARK or len(key_id) != ID_LENGTH or len(tail) != SECRET_LENGTH + CHECK_LENGTH:
        return None
    if (
        not _DIGITS.issuperset(key_id + tail)
        or _checksum(text[:-CHECK_LENGTH]) != text[-CHECK_LENGTH:]
    ):
        return None
    return ParsedKey(key_id=key_id, digest=hashlib.sha256(text.encode("ascii")).hexdigest())


def redacted(text: str) -> str:
    """``text`` without what looks like a key, whole or cut, correct or mistyped."""
    return _LIKE_A_KEY.sub(f"{MARK}_…", text)


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
