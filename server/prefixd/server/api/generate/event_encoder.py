"""The server-sent events of a stream: what its events share is serialized once."""

from typing import Any

from pydantic_core import to_json

from prefixd.server.api.generate.formatter import ResponseFormatter
from prefixd.server.api.generate.generation import Batch
from prefixd.server.engine.request import FinishEvent, TokenEvent

_PLACE = "<text>"
"""Stands for the text of an event; nothing else in an entry of ``choices`` holds it."""


def sse_event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(payload) + b"\n\n"


class EventEncoder:
    """Encodes the events of one stream; ``envelope`` holds the fields other than the choices."""

    def __init__(
        self, formatter: ResponseFormatter, envelope: dict[str, Any], *, wants_usage: bool
    ) -> None:
        self._formatter = formatter
        self._envelope = envelope
        self._before = b"data: " + to_json(envelope)[:-1] + b',"choices":['
        self._after = (b'],"usage":null}' if wants_usage else b"]}") + b"\n\n"
        self._around_text: dict[int, tuple[bytes, bytes]] = {}

    def openings(self, num_choices: int) -> bytes:
        """The events before the first text."""
        return b"".join(map(self._event, self._formatter.openings(num_choices)))

    def batch(self, batch: Batch) -> bytes:
        """The events of what is ready at once; empty when none of it is shown."""
        return b"".join([self._one(choice, event) for choice, event in batch])

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event with the token counts."""
        return sse_event({**self._envelope, "choices": [], "usage": usage})

    def _one(self, choice: int, event: TokenEvent | FinishEvent) -> bytes:
        if isinstance(event, FinishEvent):
            return self._event(self._formatter.closing(choice, event.reason))
        if event.logprobs:
            return self._event(self._formatter.delta(choice, event))
        if not event.text:
            return b""
        around = self._around_text.get(choice) or self._split_at_text(choice)
        return around[0] + to_json(event.text) + around[1]

    def _split_at_text(self, choice: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text in the events of a choice."""
        event = self._event(self._formatter.delta(choice, TokenEvent(choice, _PLACE, ())))
        before, _, after = event.rpartition(to_json(_PLACE))
        self._around_text[choice] = before, after
        return before, after

    def _event(self, entry: dict[str, Any]) -> bytes:
        return self._before + to_json(entry) + self._after
