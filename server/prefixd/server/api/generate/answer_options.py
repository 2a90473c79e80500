"""What an answer contains besides its text, as its request asks for it."""

from dataclasses import dataclass
from typing import Any

from prefixd.server.api.generate.fields import GenerationFields
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.request import FinishEvent


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Names and meaning as in vLLM.

    ``top_logprobs`` None asks for no log-probabilities. ``token_ids``: the ids of prompt and output
    too. ``names_by_id``: tokens of log-probabilities are named ``token_id:123``. ``silent_stops``
    are token ids that end a text without being its ``stop_reason``: the model's own.
    """

    top_logprobs: int | None = None
    token_ids: bool = False
    names_by_id: bool = False
    silent_stops: frozenset[int] = frozenset()

    def ending(self, end: FinishEvent) -> dict[str, Any]:
        """The fields of a choice that say how it ended."""
        stop = None if end.stop in self.silent_stops else end.stop
        return {"finish_reason": end.reason.value, "stop_reason": stop}


def answer_options(
    body: GenerationFields, served: ServedModel, *, top_logprobs: int | None
) -> AnswerOptions:
    """What ``body`` asks for, on the served model."""
    return AnswerOptions(
        top_logprobs=top_logprobs,
        token_ids=bool(body.return_token_ids),
        names_by_id=bool(body.return_tokens_as_token_ids),
        silent_stops=frozenset() if body.ignore_eos else served.eos_token_ids,
    )
