"""Answers of given token ids: through the engine's output processor, without a model."""

from collections.abc import Sequence
from typing import Any

from prefixd.server.api.generate.answer_options import AnswerOptions
from prefixd.server.api.generate.formatter import ChatFormatter, CompletionFormatter
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    SamplingParams,
    StopParams,
    TokenEvent,
    TokenLogprob,
)
from prefixd.server.engine.sequence import End, sequences_of
from prefixd.server.engine.step import Sampled
from prefixd.server.model.tokenizer import Tokenizer

LIKELY = AnswerOptions(top_logprobs=20)


class Answer:
    """One answer. ``events`` are those of its text; it ended after ``num_tokens`` tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        output: Sequence[int],
        *,
        likely: Sequence[int] = (),
        **stop: Any,
    ) -> None:
        """``likely`` are the likeliest tokens of each position; ``stop`` as of StopParams."""
        self._tokenizer = tokenizer
        received: list[Event] = []
        request = AdmittedRequest(
            request_id="r",
            tenant="t",
            prompt=tuple(prompt),
            prefix=None,
            sampling=SamplingParams(top_logprobs=0),
            stop=StopParams(**{"max_tokens": max(1, len(output)), **stop}),
        )
        (sequence,) = sequences_of(request, first_id=0, seed=0)
        outputs = OutputProcessor(tokenizer.detokenizer)
        outputs.open([sequence], received.append)
        top = tuple(TokenLogprob(token, -1.0 - rank) for rank, token in enumerate(likely))
        end: End | None = None
        for token in output:
            sampled = Sampled(token, logprob=-0.5, top_logprobs=top)
            end = outputs.push({0: [sampled]}).get(0)
            sequence.tokens.append(token)
            if end is not None:
                break
        self.end = outputs.flush(sequence, end or End(FinishReason.LENGTH))
        self.num_tokens = sequence.num_output
        self.events = [event for event in received if isinstance(event, TokenEvent)]

    @property
    def _finish(self) -> FinishEvent:
        return FinishEvent(0, self.end.reason, self.num_tokens, stop=self.end.stop)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    def completion(self) -> Any:
        """The choice of a completion with log-probabilities."""
        return CompletionFormatter(self._tokenizer, LIKELY).whole(0, self.events, self._finish)

    def completion_chunks(self) -> list[Any]:
        """The choices of its chunks."""
        formatter = CompletionFormatter(self._tokenizer, LIKELY)
        return [formatter.delta(0, event) for event in self.events]

    def message_logprobs(self) -> Any:
        """The entries of a chat's log-probabilities."""
        choice = ChatFormatter(self._tokenizer, LIKELY).whole(0, self.events, self._finish)
        return choice["logprobs"]["content"]
