"""What the text of an answer is made of, in the order in which it is written."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call ``index`` of the answer, of the function ``name``."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The arguments of a call are not JSON. ``raw`` is all that the model wrote of the call: a
    whole answer has it as content; what a stream has sent of the call stands."""

    index: int
    raw: str


Piece = Content | Reasoning | CallStart | CallArguments | CallBroken
