"""Which answers a hostile tenant may get.

It may be refused, shed or timed out. An answer that says that the server failed is a defect, and so
is an error that has not the documented shape.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

_REFUSALS = frozenset({"overloaded", "deadline_exceeded"})
"""Codes of errors from 500 that say nothing is broken."""

_NOT_HTTP = 400, b"Invalid HTTP request received."
"""The answer of uvicorn's parser, before there is a request."""


@dataclass
class Answers:
    """The answers to one client. ``outcomes`` counts statuses and codes, and ``defects`` has a line
    for each answer that must not occur: both may be shared. ``label`` and ``request`` say what was
    sent last."""

    outcomes: Counter[str]
    defects: list[str]
    label: str = ""
    request: str = ""

    def check(self, status: int, body: bytes, *, method: str) -> None:
        """Count a whole answer, and note what is wrong with it."""
        self.outcomes[str(status)] += 1
        if status < 400 or method == "HEAD" or (status, body) == _NOT_HTTP:
            return
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == 503 and isinstance(answer, dict) and answer.get("status") == "not ready":
            self.defects.append(f"{self.label}: not ready: {self.request}")
            return
        self.check_error(status, answer)

    def check_error(self, status: int, answer: Any) -> None:
        """Count an error, and note what is wrong with it. An error in a stream has no status of
        its own: 500."""
        error = answer.get("error") if isinstance(answer, dict) else None
        code = _code_of(error) if isinstance(error, dict) else None
        if not isinstance(error, dict) or not error.get("message") or not code:
            self.defects.append(f"{self.label}: {status} {str(answer)[:300]}: {self.request}")
        elif status >= 500 and code not in _REFUSALS:
            self.defects.append(f"{self.label}: {status} {error}: {self.request}")
        else:
            self.outcomes[code] += 1


def _code_of(error: dict[str, Any]) -> str | None:
    """The code of an error, which in Anthropic's shape is among its details."""
    code = error.get("code") or (error.get("details") or {}).get("error_code")
    return None if code is None else str(code)
