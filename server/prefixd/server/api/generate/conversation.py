"""A conversation, and how the chat template renders it: fields of a chat completion."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.messages import AssistantTurn, Message
from prefixd.server.api.generate.shapes import refusal
from prefixd.server.api.generate.tools.fields import ToolFields

MAX_TEMPLATE_KWARGS_BYTES = 16 * 1024

RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""What ``apply_chat_template`` takes besides the variables of a template."""


class Conversation(StrictModel):
    """The turns, and how they become a prompt."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Whether the prompt ends where the assistant's next turn begins. Default: "
        "true, or false with `continue_final_message`.",
    )
    continue_final_message: bool | None = Field(
        default=None, description="Continue the last turn, the assistant's, instead of a new one."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        max_length=64,
        description="Variables of the model's chat template, such as `enable_thinking`.",
    )

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return self.chat_template_kwargs or {}

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @model_validator(mode="after")
    def _check_final_message(self) -> "Conversation":
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise refusal(
                "expected false with 'add_generation_prompt': true; received true",
                at=("continue_final_message",),
            )
        last = self.messages[-1]
        if not isinstance(last, AssistantTurn) or not last.content or last.tool_calls:
            raise refusal(
                "expected a last message of the assistant with text to continue; received another",
                at=("continue_final_message",),
            )
        return self

    @model_validator(mode="after")
    def _check_template_kwargs(self) -> "Conversation":
        kwargs = self.chat_template_kwargs or {}
        place = "chat_template_kwargs"
        for name in kwargs:
            if name in RESERVED_KWARGS:
                raise refusal(
                    "expected a variable of the chat template; this one is set by the request",
                    at=(place, name),
                )
            if not name.isidentifier():
                raise refusal(
                    "expected names of variables, such as 'enable_thinking'; received a text of "
                    f"{len(name)} characters that is none",
                    at=(place,),
                )
        size = len(json.dumps(kwargs))
        if size > MAX_TEMPLATE_KWARGS_BYTES:
            raise refusal(
                f"expected at most {MAX_TEMPLATE_KWARGS_BYTES} bytes; received {size}", at=(place,)
            )
        return self


def _check_effort(effort: str) -> str:
    if effort != "none":
        raise refusal(
            "expected 'none', the only one supported; received another", kind="unsupported_at"
        )
    return effort


Effort = Annotated[str, AfterValidator(_check_effort)]
"""How much the model thinks."""


class ToolConversation(Conversation, ToolFields):
    """A conversation with a model that may call tools and think."""

    reasoning_effort: Effort | None = Field(
        default=None, description="`none` sets `enable_thinking` of the chat template to false."
    )
    include_reasoning: bool | None = Field(
        default=None, description="With false, reasoning is left out. Default: true."
    )

    @property
    def template_variables(self) -> dict[str, Any]:
        """As of Conversation."""
        thinking = {} if self.reasoning_effort is None else {"enable_thinking": False}
        return {**thinking, **(self.chat_template_kwargs or {})}
