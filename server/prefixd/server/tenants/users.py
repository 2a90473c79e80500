"""The rule for the names of a tenant's end users. Everything else about them is opaque: they are
compared code point by code point, without normalization."""

import re

from prefixd.server.errors import BadRequest
from prefixd.server.tenants.tables import USER_CHARACTERS

REFUSED = r"\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069"
"""Control characters (category Cc) and overrides of the direction, for a set of a regular
expression in Python, JSON schema and JavaScript: a name with them looks like another one."""

USER_PATTERN = f"^[^{REFUSED}]+$"

_USER = re.compile(rf"[^{REFUSED}\ud800-\udfff]{{1,{USER_CHARACTERS}}}")


def check_user(user: str) -> str:
    """Return ``user`` or raise BadRequest."""
    if _USER.fullmatch(user) is None:
        raise BadRequest(
            f"expected a user of 1 to {USER_CHARACTERS} characters, none of them a control "
            "character, a direction override (U+202A to U+202E, U+2066 to U+2069) or a lone "
            f"surrogate; received {_described(user)}",
            param="user",
        )
    return user


def _described(user: str) -> str:
    refused = re.search(rf"[{REFUSED}\ud800-\udfff]", user)
    size = f"{len(user)} characters"
    return size if refused is None else f"{size}, one of them U+{ord(refused[0]):04X}"
