"""Bodies of completions and of chat completions."""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from prefixd.server.api.generate.conversation import ToolConversation
from prefixd.server.api.generate.fields import GenerationFields, misplaced, one_of
from prefixd.server.api.generate.prompt_scores import PromptOptions
from prefixd.server.api.generate.shapes import refusal
from prefixd.server.api.generate.tools.fields import NamedTool
from prefixd.server.api.generate.vllm_fields import NEUTRAL

Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    one_of("a text, a list of texts, a list of token ids, or a list of such lists"),
]


Embeds = Annotated[
    str | list[str],
    one_of("safetensors in base64, or a list of such texts"),
]


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    NEUTRAL = {  # noqa: RUF012 - a ClassVar in the base
        **NEUTRAL,
        "add_special_tokens": (None, True),
        "best_of": (None, 1),
        "suffix": (None, ""),
        "moderation": (None,),
    }

    prompt: Prompt | None = Field(
        default=None,
        description="Text, a list of texts, token ids, or a list of token id lists. Needed unless "
        "`prompt_embeds` is given.",
    )
    prompt_embeds: Embeds | None = Field(
        default=None,
        description="Embeddings [tokens, width] in place of a prompt, or several: safetensors with "
        "one tensor, in base64. Their choices come before those of `prompt`.",
    )
    max_tokens: int | None = Field(default=None, ge=0, description="0: no output.")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Log-probabilities of the N likeliest tokens."
    )
    apply_recipe: bool | None = Field(
        default=None,
        description="Whether the prefix's recipe gives the text around the prompt and what the "
        "request does not say. Default: false.",
    )
    echo: bool | None = Field(
        default=None,
        description="The text begins with the prompt, and with `logprobs` those of its tokens come "
        "first. Nothing of a prefix is shown.",
    )

    @model_validator(mode="after")
    def _check_prompt(self) -> "CompletionRequest":
        if self.prompt in (None, []) and not self.embeds:
            raise PydanticCustomError(
                "named",
                "'{name}': expected a prompt or embeddings in 'prompt_embeds'; received {received}",
                {
                    "name": "prompt",
                    "received": "neither" if self.prompt is None else "an empty list",
                },
            )
        if self.embeds and self.shown_prompt.any:
            raise PydanticCustomError(
                "named",
                "'{name}' has no tokens to show, and is not compatible with 'echo' and "
                "'prompt_logprobs': expected it without them; received both",
                {"name": "prompt_embeds"},
            )
        return self

    @property
    def shown_prompt(self) -> PromptOptions:
        """What the answer shows of the prompt."""
        return PromptOptions(bool(self.echo), self.logprobs, self.prompt_logprobs)

    @property
    def embeds(self) -> list[str]:
        """``prompt_embeds`` as a list."""
        embeds = self.prompt_embeds
        return [embeds] if isinstance(embeds, str) else embeds or []

    @property
    def num_embedding_bytes(self) -> int:
        """As of GenerationFields."""
        return sum(map(len, self.embeds))

    @property
    def prompts(self) -> list[str | list[int]]:
        """``prompt`` as a list of texts or of lists of token ids. Next to embeddings an empty text
        is none."""
        if self.prompt is None or (not self.prompt and self.embeds):
            return []
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [part for part in self.prompt if isinstance(part, int)]
        if token_ids or not self.prompt:
            return [token_ids]
        return [part for part in self.prompt if not isinstance(part, int)]


class ChatRequest(ToolConversation, GenerationFields):
    """Body of POST /v1/chat/completions."""

    NEUTRAL = {  # noqa: RUF012 - a ClassVar in the base
        **NEUTRAL,
        "add_special_tokens": (None, False),
        "audio": (None,),
        "chat_template": (None,),
        "documents": (None, []),
        "echo": (None, False),
        "function_call": (None, "none"),
        "functions": (None, []),
        "mm_processor_kwargs": (None, {}),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "prediction": (None,),
        "prompt_cache_options": (None,),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }

    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Same as `max_tokens`, and wins over it."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def shown_prompt(self) -> PromptOptions:
        """What the answer shows of the prompt."""
        return PromptOptions(top=self.prompt_logprobs)

    @property
    def num_top_logprobs(self) -> int | None:
        """``top_logprobs`` where log-probabilities are wanted, otherwise None."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise misplaced("top_logprobs", "'logprobs': true")
        return self

    @model_validator(mode="after")
    def _check_named_tool(self) -> "ChatRequest":
        if self.structured_outputs is not None and isinstance(self.tool_choice, NamedTool):
            raise refusal(
                "expected it without the name of a tool in 'tool_choice'; received both",
                at=("structured_outputs",),
            )
        return self
