"""The scoring part of the protocol: how likely each of several texts is."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from prefixd.client.types import NullIsDefault, PrefixUsed, ResponseModel, Usage
from prefixd.client.wire import Call, Repeat, parser, request_of


class ScoredChoice(ResponseModel):
    """One choice: the sum of the log-probabilities of its tokens, their number, and whether each of
    them is the likeliest one there."""

    index: int
    logprob: float
    num_tokens: int
    is_greedy: bool
    token_ids: Annotated[tuple[int, ...], Field(strict=False)]
    token_logprobs: Annotated[tuple[float, ...], Field(strict=False)]


def _by_index(choices: tuple[ScoredChoice, ...]) -> tuple[ScoredChoice, ...]:
    return tuple(sorted(choices, key=lambda choice: choice.index))


class Loglikelihood(ResponseModel):
    """How likely each choice is after one prompt, in the order of the request."""

    id: str
    model: str
    choices: Annotated[tuple[ScoredChoice, ...], Field(min_length=1), AfterValidator(_by_index)]
    usage: Usage | None = None
    prefix: PrefixUsed | None = None
    warnings: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()

    @property
    def best(self) -> int:
        """The index of the likeliest choice."""
        return max(self.choices, key=lambda choice: choice.logprob).index


def loglikelihood(
    choices: Sequence[str | Sequence[int]],
    *,
    model: str,
    prompt: str | Sequence[int] | None = None,
    messages: Sequence[Mapping[str, object]] | None = None,
    apply_recipe: bool = False,
    user: str | None = None,
) -> Call[Loglikelihood]:
    """The log-likelihood of each choice after a prompt or a conversation, under a prefix reference
    or the bare base. ``apply_recipe`` is for a prompt; a conversation has it applied."""
    body: dict[str, object] = {"model": model, "choices": list(choices)}
    if prompt is not None:
        body["prompt"] = prompt
    if messages is not None:
        body["messages"] = list(messages)
    if apply_recipe:
        body["apply_recipe"] = True
    if user is not None:
        body["user"] = user
    request = request_of("POST", "v1", "loglikelihood", json=body, repeat=Repeat.UNANSWERED)
    return Call(request, parser(Loglikelihood))
