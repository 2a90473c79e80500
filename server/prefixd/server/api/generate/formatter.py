"""Responses of the generating routes: OpenAI's, with the prefix that was used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from prefixd.server.api.generate.logprobs import chat_logprobs, completion_logprobs
from prefixd.server.api.metrics import Endpoint
from prefixd.server.api.served import Tokenizer
from prefixd.server.engine.request import FinishReason, TokenEvent
from prefixd.server.tenants.bindings import ChosenBy


class PrefixUsed(BaseModel):
    """The version that was used, fixed when the request was admitted, and why it was chosen."""

    name: str
    version: int
    digest: str
    chosen_by: ChosenBy


class PromptTokensDetails(BaseModel):
    """``cached_tokens`` of the prompt were not computed: their KV was shared."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts; virtual tokens of a prefix are not among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One choice of a completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """Response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    prefix: PrefixUsed | None


class TopLogprob(BaseModel):
    """A likely token at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """A generated token, and the likeliest ones at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of one message."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    """The message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One choice of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatAnswer(BaseModel):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    prefix: PrefixUsed | None


@dataclass(frozen=True, slots=True)
class CompletionFormatter:
    """Formats one response of /v1/completions. Each method returns an entry of ``choices``."""

    endpoint: ClassVar = Endpoint.COMPLETIONS
    object: ClassVar = "text_completion"
    chunk_object: ClassVar = "text_completion"

    tokenizer: Tokenizer
    top_logprobs: int | None

    def openings(self, num_choices: int) -> list[dict[str, Any]]:
        """Entries before the first text: a completion has none."""
        del num_choices
        return []

    def delta(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        """New text."""
        return {
            "index": choice,
            "text": event.text,
            "logprobs": self._logprobs([event]),
            "finish_reason": None,
        }

    def closing(self, choice: int, reason: FinishReason) -> dict[str, Any]:
        """The end of the text."""
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": reason.value}

    def whole(
        self, choice: int, events: Sequence[TokenEvent], reason: FinishReason
    ) -> dict[str, Any]:
        """The whole text."""
        return {
            "index": choice,
            "text": "".join([event.text for event in events]),
            "logprobs": self._logprobs(events),
            "finish_reason": reason.value,
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        positions = [position for event in events for position in event.logprobs]
        if not positions:
            return None
        return completion_logprobs(positions, self.tokenizer, with_top=bool(self.top_logprobs))


@dataclass(frozen=True, slots=True)
class ChatFormatter:
    """Formats one response of /v1/chat/completions. Methods as of CompletionFormatter."""

    endpoint: ClassVar = Endpoint.CHAT
    object: ClassVar = "chat.completion"
    chunk_object: ClassVar = "chat.completion.chunk"

    tokenizer: Tokenizer
    top_logprobs: int | None

    def openings(self, num_choices: int) -> list[dict[str, Any]]:
        """The role of each message, before its first text."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice, delta) for choice in range(num_choices)]

    def delta(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        """New text of the message."""
        chunk = self._chunk(choice, {"content": event.text})
        chunk["logprobs"] = self._logprobs([event])
        return chunk

    def closing(self, choice: int, reason: FinishReason) -> dict[str, Any]:
        """The end of the message."""
        return {**self._chunk(choice, {}), "finish_reason": reason.value}

    def whole(
        self, choice: int, events: Sequence[TokenEvent], reason: FinishReason
    ) -> dict[str, Any]:
        """The whole message."""
        content = "".join([event.text for event in events])
        return {
            "index": choice,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprobs(events),
            "finish_reason": reason.value,
        }

    def _chunk(self, choice: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        positions = [position for event in events for position in event.logprobs]
        if not positions:
            return None
        return chat_logprobs(positions, self.tokenizer, with_top=bool(self.top_logprobs))


ResponseFormatter = CompletionFormatter | ChatFormatter
