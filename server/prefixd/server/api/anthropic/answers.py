"""Responses of POST /v1/messages, whole and as events."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from prefixd.server.api.anthropic_errors import anthropic_error
from prefixd.server.api.generate.answer_blocks import (
    Block,
    BlockKind,
    Change,
    Closed,
    Grown,
    Opened,
    call_id,
)
from prefixd.server.api.generate.block_answer import BlockAnswer, named_event
from prefixd.server.api.generate.service import Running, envelope
from prefixd.server.errors import PrefixdError


class MessageAnswer(BlockAnswer):
    """An ``Answer`` of this shape: each block is one of ``content``."""

    def __init__(self, running: Running) -> None:
        super().__init__(running)
        own = envelope(running.admitted, "message")
        self._shared = {
            "id": own["id"],
            "type": "message",
            "role": "assistant",
            "model": own["model"],
            "prefix": own["prefix"],
            **running.admitted.head,
        }

    def body(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """As of BlockAnswer."""
        content = [self._block(block) for block in blocks]
        return {**self._shared, "content": content, **self._stop(blocks), "usage": self._usage()}

    def opening(self) -> bytes:
        """As of BlockAnswer. How much of the prompt was shared is known at the end alone."""
        unknown = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        usage = {"input_tokens": self.admitted.prompt_tokens, "output_tokens": 0, **unknown}
        stop = {"stop_reason": None, "stop_sequence": None}
        message = {**self._shared, "content": [], **stop, "usage": usage}
        return named_event({"type": "message_start", "message": message}) + named_event(
            {"type": "ping"}
        )

    def written(self, change: Change) -> bytes:
        """As of BlockAnswer."""
        match change:
            case Opened(block):
                fields: dict[str, Any] = {"content_block": self._block(block)}
                kind = "start"
            case Grown(block, text):
                fields, kind = {"delta": _delta(block, text)}, "delta"
            case Closed(block):
                fields, kind = {}, "stop"
        return named_event({"type": f"content_block_{kind}", "index": block.index, **fields})

    def ending(self, error: PrefixdError | None) -> bytes:
        """As of BlockAnswer."""
        if error is not None:
            return named_event(anthropic_error(error, self.record.request_id))
        stop = self._stop(self.reader.blocks)
        delta = {"type": "message_delta", "delta": stop, "usage": self._usage()}
        return named_event(delta) + named_event({"type": "message_stop"})

    def _block(self, block: Block) -> dict[str, Any]:
        match block.kind:
            case BlockKind.TEXT:
                return {"type": "text", "text": block.text, "citations": None}
            case BlockKind.REASONING:
                return {"type": "thinking", "thinking": block.text, "signature": ""}
            case BlockKind.CALL:
                return {
                    "type": "tool_use",
                    "id": call_id(self.admitted.syntax, block.id, head="toolu_"),
                    "name": block.name,
                    "input": _arguments(block.text),
                }

    def _stop(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """Why the answer ended. ``blocks`` are all of it."""
        end = self.reader.end
        sequence = end.stop if end is not None and isinstance(end.stop, str) else None
        if self.reader.is_cut:
            reason = "max_tokens"
        elif any(block.kind is BlockKind.CALL and block.is_complete for block in blocks):
            reason = "tool_use"
        else:
            reason = "end_turn" if sequence is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, Any]:
        cached = self.record.cached_tokens
        return {
            "input_tokens": self.admitted.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.record.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.reader.reasoning_tokens},
        }


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case BlockKind.TEXT:
            return {"type": "text_delta", "text": text}
        case BlockKind.REASONING:
            return {"type": "thinking_delta", "thinking": text}
        case BlockKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call, of one that was cut as far as they came."""
    try:
        arguments = from_json(text or "{}", allow_partial=True)
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {}
