"""Requests of other shapes as chats, whose errors keep the names of their own shape."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from prefixd.server.api.generate.requests import ChatRequest
from prefixd.server.api.validation_words import from_validation
from prefixd.server.errors import PrefixdError

Names = Mapping[str, str]
"""Patterns of places in a chat, and the places in another shape that they stand for."""


@contextmanager
def in_names(names: Names, words: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors raised inside name places by ``names``, the first that matches, and ``words`` of a
    chat by those of the other shape."""
    try:
        yield
    except PrefixdError as error:
        for word, own in (words or {}).items():
            error.message = error.message.replace(f"'{word}'", own)
        if error.param is not None:
            own = _renamed(error.param, names)
            error.message = error.message.replace(f"'{error.param}'", f"'{own}'")
            error.param = own
        error.args = (error.message,)
        raise


def chat_of(fields: Mapping[str, Any]) -> ChatRequest:
    """A chat with these fields; None stands for a field that is left out. Raises BadRequest."""
    try:
        return ChatRequest.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from None


def _renamed(param: str, names: Names) -> str:
    for pattern, own in names.items():
        new, count = re.subn(f"^{pattern}", own, param, count=1)
        if count:
            return new
    return param
