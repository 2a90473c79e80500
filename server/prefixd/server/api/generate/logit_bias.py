"""The field ``logit_bias``: token ids, which JSON writes as texts, and what is added to their
logits."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

_TOKEN_ID = re.compile(r"[0-9]{1,9}")


def _check_keys(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    wrong = [key for key in value if not _TOKEN_ID.fullmatch(str(key))]
    if wrong:
        # A key may be text of a prompt, which no message repeats.
        raise PydanticCustomError(
            "refused",
            "expected token ids as keys, each a text of 1 to 9 digits; received {count} of another "
            "form, the first of {length} characters",
            {"count": len(wrong), "length": len(wrong[0])},
        )
    return value


LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=1024),
    BeforeValidator(_check_keys),
]
