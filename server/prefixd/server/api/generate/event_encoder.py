"""The server-sent events of a stream: what its events share is serialized once."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from prefixd.server.api.generate.formatter import ResponseFormatter
from prefixd.server.api.generate.generation import Batch
from prefixd.server.api.generate.parsed_formatter import ParsedChatFormatter
from prefixd.server.engine.request import Event, FinishEvent, ScoreEvent, TokenEvent

_PLACE = "<text>"
"""Stands for the text of an event; nothing else in an entry of ``choices`` holds it."""


def sse_event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(payload) + b"\n\n"


class EventEncoder:
    """Encodes the events of one stream; ``envelope`` holds the fields other than the choices,
    ``head`` more of them for the first event.

    ``prompt_tokens``, the number for each choice, asks for the counts so far in each event; each
    token of the output counts for ``num_rows``.
    """

    def __init__(
        self,
        formatter: ResponseFormatter,
        envelope: dict[str, Any],
        *,
        head: dict[str, Any] | None = None,
        wants_usage: bool,
        prompt_tokens: Sequence[int] = (),
        num_rows: int = 1,
    ) -> None:
        self._formatter = formatter
        self._envelope = envelope
        self._prompt_tokens = prompt_tokens
        self._num_rows = num_rows
        self._shows_ids = formatter.options.token_ids
        self._before = self._opened(envelope)
        self._after = (b'],"usage":null}' if wants_usage else b"]}") + b"\n\n"
        self._head = {**(head or {}), **formatter.head()}
        self._counts: Counter[int] = Counter()
        self._begun: set[int] = set()
        self._around_text: dict[int, tuple[bytes, bytes]] = {}

    def openings(self, num_choices: int) -> bytes:
        """The events before the first text."""
        return b"".join(map(self._event, self._formatter.openings(num_choices)))

    def batch(self, batch: Batch) -> bytes:
        """The events of what is ready at once; empty when none of it is shown. The end of a choice
        comes with its last text, where both are ready."""
        ends = {choice: event for choice, event in batch if isinstance(event, FinishEvent)}
        if not ends or isinstance(self._formatter, ParsedChatFormatter):
            return b"".join([self._one(choice, event) for choice, event in batch])
        last = {
            choice: event
            for choice, event in batch
            if isinstance(event, TokenEvent) and self._is_shown(event)
        }
        encoded = []
        for choice, event in batch:
            end = ends.get(choice)
            if end is None:
                encoded.append(self._one(choice, event))
            elif event is last.get(choice):
                encoded.append(self._last(choice, last[choice], end))
            elif event is not end or choice not in last:
                encoded.append(self._one(choice, event))
        return b"".join(encoded)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event with the token counts."""
        return sse_event({**self._envelope, "choices": [], "usage": usage})

    def _is_shown(self, event: TokenEvent) -> bool:
        return bool(event.text or event.logprobs or (self._shows_ids and event.token_ids))

    def _one(self, choice: int, event: Event) -> bytes:
        if isinstance(self._formatter, ParsedChatFormatter):
            if isinstance(event, TokenEvent):
                self._counts[choice] += len(event.token_ids)
            return b"".join(map(self._event, self._formatter.entries(choice, event)))
        if isinstance(event, FinishEvent):
            self._counts[choice] = event.completion_tokens
            entry = self._formatter.closing(choice, event)
            return self._event(self._begin(choice) | entry)
        if isinstance(event, ScoreEvent):
            return b""
        if self._prompt_tokens:
            self._counts[choice] += len(event.token_ids)
        elif not event.logprobs and not self._shows_ids and not self._head:
            if not event.text:
                return b""
            around = self._around_text.get(choice) or self._split_at_text(choice)
            return around[0] + to_json(event.text) + around[1]
        return self._event(self._delta(choice, event)) if self._is_shown(event) else b""

    def _last(self, choice: int, event: TokenEvent, end: FinishEvent) -> bytes:
        """The last text of a choice and its end, as one event."""
        self._counts[choice] = end.completion_tokens
        entry = self._delta(choice, event)
        return self._event(entry | self._formatter.options.ending(end))

    def _delta(self, choice: int, event: TokenEvent) -> dict[str, Any]:
        return self._formatter.delta(choice, event) | self._begin(choice)

    def _begin(self, choice: int) -> dict[str, Any]:
        """The fields of the first entry of a choice, once."""
        if choice in self._begun:
            return {}
        self._begun.add(choice)
        return self._formatter.start(choice)

    def _split_at_text(self, choice: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text in the events of a choice."""
        event = self._event(self._formatter.delta(choice, TokenEvent(choice, _PLACE, ())))
        before, _, after = event.rpartition(to_json(_PLACE))
        self._around_text[choice] = before, after
        return before, after

    def _event(self, entry: dict[str, Any]) -> bytes:
        before, after = self._before, self._after
        if self._head:
            before, self._head = self._opened({**self._envelope, **self._head}), {}
        if self._prompt_tokens:
            after = b'],"usage":' + to_json(self._usage_so_far(entry["index"])) + b"}\n\n"
        return before + to_json(entry) + after

    def _usage_so_far(self, choice: int) -> dict[str, int]:
        prompt, completion = self._prompt_tokens[choice], self._num_rows * self._counts[choice]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    @staticmethod
    def _opened(envelope: dict[str, Any]) -> bytes:
        return b"data: " + to_json(envelope)[:-1] + b',"choices":['
