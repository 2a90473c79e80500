"""Responses of generations: whole ones and chunks of streams."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, AliasPath, Field, model_validator

from prefixd.client.types_base import NullIsDefault, ResponseModel
from prefixd.client.types_prefixes import PrefixUsed


class Usage(ResponseModel):
    """Tokens counted by the server, without the virtual tokens of the prefix.

    ``cached_tokens`` of the prompt were not computed: KV reuse supplied their KV.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: Annotated[int, NullIsDefault] = Field(
        default=0,
        validation_alias=AliasChoices(
            "cached_tokens", AliasPath("prompt_tokens_details", "cached_tokens")
        ),
    )


class ChatMessage(ResponseModel):
    """The ``message`` or ``delta`` of a chat choice; the first delta has the role alone."""

    content: Annotated[str, NullIsDefault] = ""


class _GeneratedText(ResponseModel):
    index: int
    text: str
    finish_reason: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_of_chat(cls, fields: object) -> object:
        # The chat endpoint sends the text as `message` (whole) or `delta` (streamed).
        if isinstance(fields, Mapping):
            for key in ("message", "delta"):
                if key in fields:
                    return {**fields, "text": ChatMessage.model_validate(fields[key]).content}
        return fields


class Choice(_GeneratedText):
    """One generated text. ``finish_reason`` is ``stop`` or ``length``."""

    logprobs: Mapping[str, object] | None = None


class CompletionChunk(_GeneratedText):
    """A piece of a streamed generation; only the last one has ``usage``.

    The server uses "chunk" for a piece of a prompt in a prefill.
    """

    usage: Usage | None = None


def _by_index(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    return tuple(sorted(choices, key=lambda choice: choice.index))


class Completion(ResponseModel):
    """A finished generation of either endpoint; the content of a chat message is its ``text``.
    ``warnings`` say what was likely not meant."""

    id: str
    model: str
    choices: Annotated[tuple[Choice, ...], Field(min_length=1), AfterValidator(_by_index)]
    usage: Usage | None = None
    prefix: PrefixUsed | None = None
    warnings: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text
