"""Fields of vLLM that both endpoints have here: those that work, and those that are refused unless
their value changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.prompts import PromptTokens
from prefixd.server.errors import BadRequest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "cache_salt": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1, 1.0),
    "logits_processors": (None, []),
    "logprob_token_ids": (None,),
    "max_repetition_pattern_size": (None, 0),
    "min_repetition_pattern_size": (None, 0),
    "repetition_detection": (None,),
    "repetition_min_count": (None, 0),
    "return_prompt_text": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
    "thinking_token_budget": (None, -1),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
}
"""Unsupported field -> its values that change nothing."""

RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class VllmFields(StrictModel):
    """Fields of both kinds of request."""

    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Of each prompt at most so many tokens, the last ones, are used.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="`right`: the first ones are used. Default: `left`."
    )
    request_id: RequestId | None = Field(
        default=None, description="The end of the `id` of the response."
    )


def truncated(prompts: Sequence[PromptTokens], body: VllmFields) -> list[PromptTokens]:
    """The prompts as ``body`` cuts them. Raises BadRequest for one that holds more than tokens."""
    most = body.truncate_prompt_tokens
    if most is None:
        return list(prompts)
    if any(prompt.rows or prompt.given for prompt in prompts):
        raise BadRequest(
            "'truncate_prompt_tokens': expected prompts of tokens alone; received one with virtual "
            "tokens or embeddings inside",
            param="truncate_prompt_tokens",
        )
    kept = slice(most) if body.truncation_side == "right" else slice(-most, None)
    return [
        prompt
        if len(prompt.token_ids) <= most
        else replace(prompt, token_ids=prompt.token_ids[kept], text=None)
        for prompt in prompts
    ]
