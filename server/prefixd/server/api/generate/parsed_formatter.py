"""Chat responses whose text is parsed: reasoning and calls as fields of their own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from prefixd.server.api.answers.parser import (
    AnswerParser,
    AnswerSyntax,
    parse,
)
from prefixd.server.api.answers.pieces import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Piece,
    Reasoning,
)
from prefixd.server.api.generate.answer_blocks import call_id, random_id
from prefixd.server.api.generate.formatter import ChatFormatter, ResponseFormatter
from prefixd.server.engine.request import Event, FinishEvent, FinishReason, TokenEvent


@dataclass(slots=True)
class _Stream:
    """One choice of a stream: ``calls`` are those that are JSON so far."""

    parser: AnswerParser
    calls: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ParsedChatFormatter(ChatFormatter):
    """Formats one response of /v1/chat/completions in this syntax."""

    syntax: AnswerSyntax = field(default_factory=AnswerSyntax)
    _streams: dict[int, _Stream] = field(default_factory=dict)

    def entries(self, choice: int, event: Event) -> list[dict[str, Any]]:
        """The entries of ``choices`` for one event of a stream, in order."""
        stream = self._streams.get(choice)
        if stream is None:
            stream = self._streams[choice] = _Stream(AnswerParser(self.syntax))
        if isinstance(event, FinishEvent):
            pieces = stream.parser.end(is_cut=event.reason is FinishReason.LENGTH)
            entries = self._entries(choice, stream, pieces)
            return [*entries, _ended(self.closing(choice, event), bool(stream.calls))]
        if not isinstance(event, TokenEvent):
            return []
        entries = self._entries(choice, stream, stream.parser.push(event.text))
        shown = self.delta(choice, event)
        if not entries and (shown["logprobs"] or shown.get("token_ids")):
            entries = [self._chunk(choice, {})]
        if entries:
            entries[0] = {**shown, "delta": entries[0]["delta"]}
            if "token_ids" in shown:
                entries[1:] = [{**entry, "token_ids": []} for entry in entries[1:]]
        return entries

    def whole(self, choice: int, events: Sequence[TokenEvent], end: FinishEvent) -> dict[str, Any]:
        """The entry of the whole message."""
        text = "".join([event.text for event in events])
        answer = parse(text, self.syntax, is_cut=end.reason is FinishReason.LENGTH)
        entry = ChatFormatter.whole(self, choice, events, end)
        message = entry["message"]
        if not answer.content and (answer.calls or answer.reasoning):
            message["content"] = None
        else:
            message["content"] = answer.content
        if self.syntax.reasons:
            message["reasoning_content"] = answer.reasoning or None
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": self._new_id(),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for name, arguments in answer.calls
            ]
        return _ended(entry, bool(answer.calls))

    def _entries(
        self, choice: int, stream: _Stream, pieces: Iterable[Piece]
    ) -> list[dict[str, Any]]:
        deltas = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                stream.calls.add(piece.index)
            elif isinstance(piece, CallBroken):
                stream.calls.discard(piece.index)
                continue  # what was sent of it stands
            deltas.append(self._delta(piece))
        return [self._chunk(choice, delta) for delta in deltas]

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStart(index, name):
                function = {"name": name, "arguments": ""}
                call = {"id": self._new_id(), "type": "function", "function": function}
                return {"tool_calls": [{"index": index, **call}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallBroken():
                raise AssertionError("what was sent of a broken call stands")

    def _new_id(self) -> str:
        return call_id(self.syntax, random_id(), head="call_")


def parsing(formatter: ResponseFormatter, syntax: AnswerSyntax | None) -> ResponseFormatter:
    """The formatter for answers in this syntax; None: of content alone."""
    if syntax is None or not isinstance(formatter, ChatFormatter):
        return formatter
    plain = {each.name: getattr(formatter, each.name) for each in fields(formatter)}
    return ParsedChatFormatter(**plain, syntax=syntax)


def _ended(entry: dict[str, Any], has_calls: bool) -> dict[str, Any]:
    """The entry of an end, which is that of calls if there are some and nothing was cut."""
    if has_calls and entry["finish_reason"] == FinishReason.STOP.value:
        entry["finish_reason"] = "tool_calls"
    return entry
