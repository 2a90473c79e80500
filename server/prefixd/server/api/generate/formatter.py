"""Responses of the generating routes: OpenAI's, with the prefix that was used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from prefixd.server.api.generate.answer_options import AnswerOptions
from prefixd.server.api.generate.logprobs import chat_logprobs, completion_logprobs
from prefixd.server.api.generate.prompt_scores import PromptScores
from prefixd.server.api.metrics import Endpoint
from prefixd.server.api.served import Tokenizer
from prefixd.server.engine.request import FinishEvent, TokenEvent
from prefixd.server.tenants.bindings import ChosenBy
from prefixd.store.artifact.composition import Combine


class MemberUsed(BaseModel):
    """A version that a composition is made of; ``weight`` is of a blend's."""

    model_config = ConfigDict(from_attributes=True)

    reference: str
    digest: str
    weight: float | None = None


class PrefixUsed(BaseModel):
    """The version that was used and its recipe, fixed when the request was admitted, and why it was
    chosen. A composition has ``kind`` and ``members``; one of the request itself has no name."""

    name: str | None
    version: int | None
    digest: str
    chosen_by: ChosenBy
    recipe_revision: int
    kind: str | None = None
    members: list[MemberUsed] | None = None
    combine: Combine | None = None


class PromptTokensDetails(BaseModel):
    """``cached_tokens`` of the prompt were not computed: their KV was shared."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts; virtual tokens of a prefix are not among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(BaseModel):
    """A token at a place of the prompt, the likeliest one there having rank 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, it and the likeliest ones by id; null where nothing precedes it."""


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry for each token; with ``echo`` those of the prompt come first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """What choices of both kinds have. ``stop_reason`` is the stop string or the id of the stop
    token that ended the text; ``token_ids`` come with ``return_token_ids``."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class CompletionChoice(Choice):
    """One choice of a completion."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionAnswer(BaseModel):
    """Response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    prefix: PrefixUsed | None
    warnings: list[str] | None = None


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


class MessageFunction(BaseModel):
    """A function that the model calls, and the JSON text of its arguments."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: MessageFunction


class AssistantMessage(BaseModel):
    """The message of the model. ``reasoning_content`` is there where the model may think,
    ``tool_calls`` where it calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(Choice):
    """One choice of a chat."""

    finish_reason: Literal["stop", "length", "tool_calls"] | None  # type: ignore[assignment]
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatAnswer(BaseModel):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    prefix: PrefixUsed | None
    warnings: list[str] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class CompletionFormatter:
    """Formats one response of /v1/completions. ``prompts`` are the token ids of the prompt of each
    choice, where they are wanted. ``whole_nulls``: clients of vLLM read these fields of a whole
    response without asking whether they are there."""

    whole_nulls: ClassVar[dict[str, None]] = {}
    endpoint: ClassVar = Endpoint.COMPLETIONS
    object: ClassVar = "text_completion"
    chunk_object: ClassVar = "text_completion"

    tokenizer: Tokenizer
    options: AnswerOptions = field(default_factory=AnswerOptions)
    prompts: Sequence[Sequence[int]] = ()
    prompt_scores: PromptScores | None = None

    def openings(self, num_choices: int) -> list[dict[str, Any]]:
        """Entries of ``choices`` before the first text: a completion has none."""
        del num_choices
        return []

    def head(self) -> dict[str, Any]:
        """Fields of the whole response, or of the first chunk of a stream."""
        return {}

    def start(self, choice: int) -> dict[str, Any]:
        """Fields of the first entry of a choice with text."""
        fields = {"prompt_token_ids": list(self.prompts[choice])} if self.options.token_ids else {}
        return fields | _prompt_logprobs(self.prompt_scores, choice)

    def delta(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        """An entry with new text."""
        return {
            "index": choice,
            "text": event.text,
            "logprobs": self._logprobs([event]),
            "finish_reason": None,
            **_token_ids([event], self.options),
        }

    def closing(self, choice: int, end: FinishEvent) -> dict[str, Any]:
        """The entry of the end, without text."""
        return {"index": choice, "text": "", "logprobs": None, **self.options.ending(end)}

    def whole(self, choice: int, events: Sequence[TokenEvent], end: FinishEvent) -> dict[str, Any]:
        """The entry of the whole text."""
        return {
            "index": choice,
            "text": "".join([event.text for event in events]),
            "logprobs": self._logprobs(events),
            **self.options.ending(end),
            "prompt_token_ids": None,
            "prompt_logprobs": None,
            "token_ids": None,
            **self.start(choice),
            **_token_ids(events, self.options),
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        positions = [position for event in events for position in event.logprobs]
        if not positions:
            return None
        return completion_logprobs(positions, self.tokenizer, by_id=self.options.names_by_id)


@dataclass(frozen=True, slots=True)
class ChatFormatter:
    """Formats one response of /v1/chat/completions. Methods as of CompletionFormatter."""

    whole_nulls: ClassVar[dict[str, None]] = {"prompt_token_ids": None, "prompt_logprobs": None}
    endpoint: ClassVar = Endpoint.CHAT
    object: ClassVar = "chat.completion"
    chunk_object: ClassVar = "chat.completion.chunk"

    tokenizer: Tokenizer
    options: AnswerOptions = field(default_factory=AnswerOptions)
    prompts: Sequence[Sequence[int]] = ()
    prompt_scores: PromptScores | None = None

    def openings(self, num_choices: int) -> list[dict[str, Any]]:
        """The role of each message, before its first text."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice, delta) for choice in range(num_choices)]

    def head(self) -> dict[str, Any]:
        """As of CompletionFormatter: a chat has one prompt."""
        fields = {"prompt_token_ids": list(self.prompts[0])} if self.options.token_ids else {}
        return fields | _prompt_logprobs(self.prompt_scores, 0)

    def start(self, choice: int) -> dict[str, Any]:
        """As of CompletionFormatter."""
        del choice
        return {}

    def delta(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        """New text of the message."""
        chunk = self._chunk(choice, {"content": event.text})
        chunk["logprobs"] = self._logprobs([event])
        return chunk | _token_ids([event], self.options)

    def closing(self, choice: int, end: FinishEvent) -> dict[str, Any]:
        """The end of the message."""
        return self._chunk(choice, {}) | self.options.ending(end)

    def whole(self, choice: int, events: Sequence[TokenEvent], end: FinishEvent) -> dict[str, Any]:
        """The whole message."""
        content = "".join([event.text for event in events])
        return {
            "index": choice,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprobs(events),
            **self.options.ending(end),
            "token_ids": None,
            **_token_ids(events, self.options),
        }

    def _chunk(self, choice: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        positions = [position for event in events for position in event.logprobs]
        if not positions:
            return None
        options = self.options
        return chat_logprobs(
            positions,
            self.tokenizer,
            with_top=bool(options.top_logprobs),
            by_id=options.names_by_id,
        )


def _token_ids(events: Sequence[TokenEvent], options: AnswerOptions) -> dict[str, Any]:
    if not options.token_ids:
        return {}
    return {"token_ids": [token for event in events for token in event.token_ids]}


def _prompt_logprobs(scores: PromptScores | None, choice: int) -> dict[str, Any]:
    return {} if scores is None else scores.prompt_logprobs(choice)


ResponseFormatter = CompletionFormatter | ChatFormatter
