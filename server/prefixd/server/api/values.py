"""Values of paths, queries and bodies that are stricter than pydantic's own types."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from prefixd.server.errors import BadRequest
from prefixd.server.tenants.tables import USER_CHARACTERS
from prefixd.server.tenants.users import USER_PATTERN, check_user

_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")
_MOST_DIGITS = 19


def _whole_number(text: object) -> object:
    # pydantic also reads +1, 1.0, 1_0, 01, spaces around, and the digits of other scripts.
    if not isinstance(text, str):
        return text
    if _WHOLE_NUMBER.fullmatch(text) is None:
        raise PydanticCustomError("whole_number", "a whole number, such as 0, 7 or -3")
    if len(text) > _MOST_DIGITS:
        raise PydanticCustomError(
            "whole_number", f"a whole number of at most {_MOST_DIGITS} digits"
        )
    return int(text)


def _flag(text: object) -> object:
    # pydantic also reads 1, on, yes, t and y.
    if not isinstance(text, str):
        return text
    if text not in {"true", "false"}:
        raise PydanticCustomError("flag", "true or false")
    return text == "true"


def _reference(text: str) -> str:
    """A reference as it is, unless its version is written in a second way (``name@03``)."""
    version = text.rpartition("@")[2]
    if version.isdigit() and _WHOLE_NUMBER.fullmatch(version) is None:
        raise BadRequest(
            f"expected a version as digits without leading zeros; received {version[:80]!a}",
            code="invalid_reference",
        )
    return text


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
"""An integer of a path or a query, written in one way only."""

Flag = Annotated[bool, BeforeValidator(_flag)]
"""A boolean of a query: ``true`` or ``false``."""

Reference = Annotated[str, AfterValidator(_reference)]
"""A prefix reference, or the version part of one, in a path."""

User = Annotated[
    str,
    AfterValidator(check_user),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 1,
            "maxLength": USER_CHARACTERS,
            "pattern": USER_PATTERN,
        }
    ),
]
"""The name of an end user."""
