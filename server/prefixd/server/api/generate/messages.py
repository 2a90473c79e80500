"""The turns of a conversation, as a chat completion receives them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.fields import one_of


class TextPart(StrictModel):
    """A piece of text content."""

    type: Literal["text"]
    text: str


class PrefixPart(StrictModel):
    """Virtual tokens `from` to `to - 1` of the soft prompt that the request names, at this place of
    the message. Those that no part names stand in front of the conversation."""

    type: Literal["prefix"]
    start: int = Field(alias="from")
    stop: int = Field(alias="to")


Content = Annotated[
    str | list[Annotated[TextPart | PrefixPart, Field(discriminator="type")]],
    one_of(
        'a text or a list of text parts {"type": "text", "text": …} and prefix parts '
        '{"type": "prefix", "from": 0, "to": 4}',
        names_item=True,
    ),
]


class ChatMessage(StrictModel):
    """One turn of a conversation. `developer` counts as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(default=None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_extras(cls, data: Any) -> Any:
        """Assistant turns received from OpenAI have fields that are empty."""
        if not isinstance(data, dict):
            return data
        empty = ("refusal", "audio", "function_call", "tool_calls", "annotations", "prefix")
        return {
            name: value for name, value in data.items() if name not in empty or value not in EMPTY
        }


EMPTY: tuple[Any, ...] = (None, [])
