"""Answers of the generating routes, as OpenAI shapes them, with the prefix that was used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from prefixd.server.api.request_record import Endpoint
from prefixd.server.api.served import Tokenizer
from prefixd.server.engine.request import FinishReason, TokenEvent, TokenLogprob
from prefixd.server.tenants.bindings import ChosenBy

# JSON has no minus infinity; vLLM writes this number for it.
_LOWEST_LOGPROB = -9999.0


class PrefixUsed(BaseModel):
    """The version that answered, fixed when the request was admitted, and why this one."""

    name: str
    version: int
    digest: str
    chosen_by: ChosenBy


class PromptTokensDetails(BaseModel):
    """What the prompt's tokens were. ``cached_tokens`` were not computed: their KV was there."""

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
    """One answer to a completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    prefix: PrefixUsed | None


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """A token that came, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of one message."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatAnswer(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    prefix: PrefixUsed | None


@dataclass(slots=True)
class ChoiceBuffer:
    """What one sequence has brought so far. ``characters`` counts token texts, for offsets."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    top_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    characters: int = 0
    finish_reason: FinishReason | None = None

    def add(self, event: TokenEvent) -> None:
        """Append ``event``."""
        self.text.append(event.text)
        self.logprobs.extend(event.logprobs)
        self.top_logprobs.extend(event.top_logprobs)


class ResponseFormatter(Protocol):
    """How one of the two routes words the same events. Each method gives the ``choices`` entry."""

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def object(self) -> str: ...

    @property
    def chunk_object(self) -> str: ...

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Before the first token, or None."""
        ...

    def delta(self, choice: int, event: TokenEvent, so_far: ChoiceBuffer) -> dict[str, Any]:
        """New output; ``so_far`` is what came before it."""
        ...

    def closing(self, choice: int, reason: FinishReason) -> dict[str, Any]:
        """The end of a sequence."""
        ...

    def whole(self, choice: int, collected: ChoiceBuffer) -> dict[str, Any]:
        """Everything at once."""
        ...


@dataclass(frozen=True, slots=True)
class CompletionFormatter:
    """Words of /v1/completions."""

    tokenizer: Tokenizer
    top_logprobs: int | None
    endpoint: Endpoint = Endpoint.COMPLETIONS
    object: str = "text_completion"
    chunk_object: str = "text_completion"

    def opening(self, choice: int) -> None:
        """Completions begin with their text."""
        del choice

    def delta(self, choice: int, event: TokenEvent, so_far: ChoiceBuffer) -> dict[str, Any]:
        """A piece of text."""
        logprobs = self._logprobs(event.logprobs, event.top_logprobs, so_far)
        return {"index": choice, "text": event.text, "logprobs": logprobs, "finish_reason": None}

    def closing(self, choice: int, reason: FinishReason) -> dict[str, Any]:
        """No more text."""
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": reason.value}

    def whole(self, choice: int, collected: ChoiceBuffer) -> dict[str, Any]:
        """The text."""
        collected.characters = 0
        return {
            "index": choice,
            "text": "".join(collected.text),
            "logprobs": self._logprobs(collected.logprobs, collected.top_logprobs, collected),
            "finish_reason": collected.finish_reason,
        }

    def _logprobs(
        self,
        chosen: Sequence[TokenLogprob],
        top: Sequence[tuple[TokenLogprob, ...]],
        so_far: ChoiceBuffer,
    ) -> dict[str, Any] | None:
        if self.top_logprobs is None or not chosen:
            return None
        tokens = [self.tokenizer.token_text(token.token_id) for token in chosen]
        offsets = []
        for token in tokens:
            offsets.append(so_far.characters)
            so_far.characters += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_shown(token) for token in chosen],
            "top_logprobs": [self._table(row) for row in top] if self.top_logprobs else None,
            "text_offset": offsets,
        }

    def _table(self, row: tuple[TokenLogprob, ...]) -> dict[str, float]:
        return {self.tokenizer.token_text(token.token_id): _shown(token) for token in row}


@dataclass(frozen=True, slots=True)
class ChatFormatter:
    """Words of /v1/chat/completions."""

    tokenizer: Tokenizer
    top_logprobs: int | None
    endpoint: Endpoint = Endpoint.CHAT
    object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def opening(self, choice: int) -> dict[str, Any]:
        """Who speaks."""
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def delta(self, choice: int, event: TokenEvent, so_far: ChoiceBuffer) -> dict[str, Any]:
        """A piece of the message."""
        del so_far
        chunk = self._chunk(choice, {"content": event.text})
        chunk["logprobs"] = self._logprobs(event.logprobs, event.top_logprobs)
        return chunk

    def closing(self, choice: int, reason: FinishReason) -> dict[str, Any]:
        """No more text."""
        return {**self._chunk(choice, {}), "finish_reason": reason.value}

    def whole(self, choice: int, collected: ChoiceBuffer) -> dict[str, Any]:
        """The message."""
        return {
            "index": choice,
            "message": {"role": "assistant", "content": "".join(collected.text), "refusal": None},
            "logprobs": self._logprobs(collected.logprobs, collected.top_logprobs),
            "finish_reason": collected.finish_reason,
        }

    def _chunk(self, choice: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(
        self, chosen: Sequence[TokenLogprob], top: Sequence[tuple[TokenLogprob, ...]]
    ) -> dict[str, Any] | None:
        if self.top_logprobs is None or not chosen:
            return None
        rows = top or [()] * len(chosen)
        content = [
            {**self._entry(token), "top_logprobs": [self._entry(one) for one in row]}
            for token, row in zip(chosen, rows, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: TokenLogprob) -> dict[str, Any]:
        text = self.tokenizer.token_text(token.token_id)
        # Half a character has no bytes to show: its token text is a replacement mark.
        raw = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _shown(token), "bytes": raw}


def _shown(token: TokenLogprob) -> float:
    return max(token.logprob, _LOWEST_LOGPROB)
