"""Names of headers that an operator may choose."""

import re

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")
_OTHER_MEANING = frozenset(
    {
        "accept",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "cookie",
        "host",
        "idempotency-key",
        "traceparent",
        "tracestate",
        "transfer-encoding",
        "user-agent",
        "x-api-key",
        "x-request-id",
    }
)


def check_header_name(name: str) -> str:
    """Return ``name`` or raise ValueError, for one that is no header or has another meaning."""
    if _NAME.fullmatch(name) is None or name.lower() in _OTHER_MEANING:
        raise ValueError(
            "expected the name of a header of your frontend: up to 64 letters, digits and hyphens, "
            "such as X-OpenWebUI-User-Id"
        )
    return name
