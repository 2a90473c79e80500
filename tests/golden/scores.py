"""Scores of prompts from the engine, and from transformers and PEFT."""

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PositionLogprobs,
    PrefixHandle,
    PromptScore,
    SamplingParams,
    ScoreEvent,
    Scoring,
    StopParams,
    TokenEvent,
)
from tests.golden.golden_harness import Served

TOLERANCE = 1e-4


@dataclass
class Scored:
    """What a request sent."""

    scores: list[PromptScore] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def values(self) -> torch.Tensor:
        return torch.tensor([score.logprob for score in self.scores])


def start(
    served: Served,
    prompt: Sequence[int],
    prefix: PrefixHandle | None = None,
    *,
    scoring: Scoring | None = None,
    count: int = 0,
    **more: Any,
) -> Callable[[], Scored]:
    """Submit a request that is scored from its second token on; the call waits for its end."""
    events: queue.Queue[Event] = queue.Queue()
    request = AdmittedRequest(
        request_id=str(next(served.numbers)),
        tenant="t",
        prompt=tuple(prompt),
        prefix=prefix,
        sampling=SamplingParams(temperature=0, top_logprobs=2),
        stop=StopParams(max_tokens=count),
        scoring=scoring or Scoring(1, top=3),
        **more,
    )
    served.engine.submit(request, events.put)

    def wait() -> Scored:
        scored = Scored()
        while True:
            event = events.get(timeout=120)
            if isinstance(event, ScoreEvent):
                scored.scores += event.scores
            elif isinstance(event, TokenEvent):
                scored.tokens += event.token_ids
                scored.logprobs += event.logprobs
            elif isinstance(event, FinishEvent):
                assert event.reason is FinishReason.LENGTH, event
                return scored

    return wait


def reference(model: Any, prompt: Sequence[int], **more: Any) -> torch.Tensor:
    """Log-probabilities [len(prompt) - 1, ids] of what follows each token but the last; in float64
    those of a model in float64."""
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits[-len(prompt) : -1].to(wide).log_softmax(dim=-1).cpu()


def check(scored: Scored, prompt: Sequence[int], expected: torch.Tensor) -> None:
    """``expected`` [len(scores), ids] are those of all ids where each scored token stands."""
    targets = torch.tensor(list(prompt)[-len(expected) :])
    own = expected.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scored.values, own, atol=TOLERANCE, rtol=0)
    top = expected.topk(3).values
    for place, score in enumerate(scored.scores):
        assert score.num_likelier == int((expected[place] > own[place]).sum())
        likely = torch.tensor([token.logprob for token in score.top])
        torch.testing.assert_close(likely, top[place, : len(likely)], atol=TOLERANCE, rtol=0)
        for token in score.top:
            assert abs(token.logprob - float(expected[place, token.token_id])) < TOLERANCE
