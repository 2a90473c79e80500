"""Bodies of the routes that read tokens and write none."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.fields import TokenId, one_of
from prefixd.server.api.generate.messages import Message
from prefixd.server.api.generate.shapes import refusal
from prefixd.server.api.generate.tools.fields import MAX_TOOLS, Tool
from prefixd.server.api.values import User

MAX_CHOICES = 128

_OF_MESSAGES = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
)

Model = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        description="The base model's name, a prefix reference (`name`, `name@3`, `name@alias`), "
        "or `base:reference`.",
    ),
]
OneUser = Annotated[
    User | None,
    Field(description="Your end user, as of a completion."),
]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class LoglikelihoodRequest(StrictModel):
    """Body of POST /v1/loglikelihood."""

    model: Model
    user: OneUser = None
    prompt: Annotated[str | list[TokenId], one_of("a text or a list of token ids")] | None = Field(
        default=None, description="What comes before each choice, or `messages`."
    )
    messages: list[Message] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="A conversation, which each choice would answer.",
    )
    choices: list[
        Annotated[Text | TokenIds, one_of("a text or a list of token ids, not empty")]
    ] = Field(
        min_length=1,
        max_length=MAX_CHOICES,
        description="Texts or lists of token ids that may follow.",
    )
    apply_recipe: bool | None = Field(
        default=None, description="As of a completion, for a `prompt`."
    )
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_prompt(self) -> "LoglikelihoodRequest":
        check_one(self.prompt, self.messages)
        return self


class TokenizeRequest(StrictModel):
    """Body of POST /tokenize, as vLLM has it."""

    model: Model | None = None
    user: OneUser = None
    prompt: str | None = Field(default=None, description="A text, or `messages`.")
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model is shown."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether the tokenizer's opening tokens are added. Default: true for a "
        "`prompt`; a chat template writes its own.",
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=64)
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> "TokenizeRequest":
        check_one(self.prompt, self.messages)
        if self.prompt is None:
            if self.add_special_tokens:
                raise refusal(
                    "expected false with 'messages': its chat template writes them; received true",
                    at=("add_special_tokens",),
                )
            return self
        for name in _OF_MESSAGES:
            if getattr(self, name) is not None:
                raise refusal(
                    "expected it with 'messages' alone; received it with 'prompt'", at=(name,)
                )
        return self


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize, as vLLM has it."""

    model: Model | None = None
    user: OneUser = None
    tokens: list[TokenId] = Field(description="Token ids.")


def check_one(prompt: object, messages: object) -> None:
    """Raise a validation error unless one of them is given."""
    if (prompt is None) == (messages is None):
        received = "neither" if prompt is None else "both"
        raise refusal(
            f"expected either a prompt or 'messages'; received {received}", at=("prompt",)
        )
