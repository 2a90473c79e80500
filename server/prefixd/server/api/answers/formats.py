"""How models write calls of tools in their text."""

from dataclasses import dataclass
from enum import StrEnum


class CallFormat(StrEnum):
    """The formats that are read and written."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Syntax:
    """The marks around calls.

    ``opener`` begins calls anywhere in the text; calls without one (``bare``) begin with such a
    character, at the start of the text. ``separator`` may stand between calls, and ``closer`` ends
    them. ``names_first``: after the opener there may be a name and its arguments instead of an
    object. ``id_size`` is the number of letters and digits that the model's template wants in an
    id; None: any id.
    """

    opener: str
    closer: str = ""
    separator: str = ""
    bare: str = ""
    names_first: bool = False
    id_size: int | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens of a tokenizer."""
        marks = (self.opener, self.closer, *(NAME_ENDS if self.names_first else ()))
        return tuple(mark for mark in marks if mark)


NAME_ENDS = ("[ARGS]", "[CALL_ID]")
"""Mistral's marks behind a name: of its arguments, and of an id before them."""

SYNTAX = {
    CallFormat.HERMES: Syntax("<tool_call>", "</tool_call>"),
    CallFormat.LLAMA3: Syntax("<|python_tag|>", separator=";", bare="{"),
    CallFormat.MISTRAL: Syntax("[TOOL_CALLS]", names_first=True, id_size=9),
    CallFormat.JSON: Syntax("", bare="[{"),
}
