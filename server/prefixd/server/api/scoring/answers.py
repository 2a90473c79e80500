"""Answers of POST /v1/loglikelihood."""

from collections.abc import AsyncIterable
from typing import Any, Literal

from pydantic import BaseModel

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.generate.formatter import PrefixUsed, Usage
from prefixd.server.api.generate.generation import Batch
from prefixd.server.api.generate.logprobs import finite
from prefixd.server.engine.request import PromptScore, ScoreEvent


class ScoredChoice(BaseModel):
    """One choice: the sum of the log-probabilities of its tokens, their number, and whether each of
    them is the likeliest one there."""

    index: int
    logprob: float
    num_tokens: int
    logprob_per_token: float
    is_greedy: bool
    token_ids: list[int]
    token_logprobs: list[float]


class LoglikelihoodAnswer(BaseModel):
    """Response of POST /v1/loglikelihood."""

    id: str
    object: Literal["loglikelihood"]
    created: int
    model: str
    choices: list[ScoredChoice]
    usage: Usage
    prefix: PrefixUsed | None
    warnings: list[str] | None = None


async def scored_choices(events: AsyncIterable[Batch], admitted: Admitted) -> list[dict[str, Any]]:
    """The entries of ``choices``, once all have been scored. Raises the error of one that fails."""
    scores: list[list[PromptScore]] = [[] for _ in admitted.requests]
    async for batch in events:
        for choice, event in batch:
            if isinstance(event, ScoreEvent):
                scores[choice] += event.scores
    return [
        _entry(index, request.prompt[admitted.shared_tokens :], each)
        for index, (request, each) in enumerate(zip(admitted.requests, scores, strict=True))
    ]


def _entry(index: int, token_ids: tuple[int, ...], scores: list[PromptScore]) -> dict[str, Any]:
    values = [finite(score.logprob) for score in scores]
    assert len(values) == len(token_ids)
    total = sum(values)
    return {
        "index": index,
        "logprob": total,
        "num_tokens": len(values),
        "logprob_per_token": total / len(values),
        "is_greedy": not any(score.num_likelier for score in scores),
        "token_ids": list(token_ids),
        "token_logprobs": values,
    }
