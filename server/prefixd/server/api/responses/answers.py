"""Responses of POST /v1/responses, whole and as events."""

import time
from collections.abc import Sequence
from typing import Any

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
from prefixd.server.api.generate.logprobs import chat_logprobs
from prefixd.server.api.generate.service import Running, envelope
from prefixd.server.api.responses.requests import NamedFunction, ResponsesRequest
from prefixd.server.api.served import Tokenizer
from prefixd.server.engine.request import PositionLogprobs
from prefixd.server.errors import PrefixdError

_PART_NAMES = {BlockKind.TEXT: "output_text", BlockKind.REASONING: "reasoning_text"}


class ResponseAnswer(BlockAnswer):
    """An ``Answer`` of this shape: each block is an item of ``output``."""

    def __init__(self, tokenizer: Tokenizer, body: ResponsesRequest, running: Running) -> None:
        super().__init__(running)
        self._tokenizer = tokenizer
        self._body = body
        self._shared = self._shared_fields()
        self._number = 0

    def body(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """As of BlockAnswer. An answer without anything is an empty message."""
        blocks = blocks or [Block(0, BlockKind.TEXT, is_complete=not self.reader.is_cut)]
        return self._ended([self._item(block) for block in blocks])

    def opening(self) -> bytes:
        """As of BlockAnswer."""
        response = {**self._shared, "status": "in_progress", "output": [], "usage": None}
        return b"".join(
            self._event(f"response.{kind}", response=response)
            for kind in ("created", "in_progress")
        )

    def written(self, change: Change) -> bytes:
        """As of BlockAnswer."""
        match change:
            case Opened(block):
                return self._opened(block)
            case Grown(block, text, positions):
                logprobs = {"logprobs": self._logprobs(positions)}
                return self._of_part(block, "delta", delta=text, **self._if_text(block, logprobs))
            case Closed(block):
                return self._closed(block)

    def ending(self, error: PrefixdError | None) -> bytes:
        """As of BlockAnswer."""
        if error is not None:
            failure = {"code": error.code, "message": error.message}
            response = {
                **self._shared,
                "status": "failed",
                "error": failure,
                "output": self._items(),
                "usage": None,
            }
            return self._event("response.failed", response=response)
        events = b""
        if not self.reader.blocks:
            empty = Block(0, BlockKind.TEXT, is_complete=not self.reader.is_cut)
            self.reader.blocks.append(empty)
            events = self._opened(empty) + self._closed(empty)
        response = self._ended(self._items())
        return events + self._event(f"response.{response['status']}", response=response)

    def _items(self) -> list[dict[str, Any]]:
        return [self._item(block) for block in self.reader.blocks]

    def _opened(self, block: Block) -> bytes:
        item = self._item(block) | {"status": "in_progress"}
        if block.kind is not BlockKind.CALL:
            item["content"] = []
        events = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind is BlockKind.CALL:
            return events
        return events + self._event("response.content_part.added", **self._place(block, part=True))

    def _closed(self, block: Block) -> bytes:
        logprobs = {"logprobs": self._logprobs(block.positions)}
        name = "arguments" if block.kind is BlockKind.CALL else "text"
        own = {"name": block.name} if block.kind is BlockKind.CALL else {}
        text = {name: block.text, **own, **self._if_text(block, logprobs)}
        events = self._of_part(block, "done", **text)
        if block.kind is not BlockKind.CALL:
            events += self._event("response.content_part.done", **self._place(block, part=True))
        item = self._item(block)
        return events + self._event(
            "response.output_item.done", output_index=block.index, item=item
        )

    def _of_part(self, block: Block, end: str, **fields: Any) -> bytes:
        name = _PART_NAMES.get(block.kind, "function_call_arguments")
        return self._event(f"response.{name}.{end}", **self._place(block), **fields)

    def _place(self, block: Block, *, part: bool = False) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": _item_id(block), "output_index": block.index}
        if block.kind is not BlockKind.CALL:
            place["content_index"] = 0
        return place | ({"part": self._part(block)} if part else {})

    def _if_text(self, block: Block, fields: dict[str, Any]) -> dict[str, Any]:
        return fields if block.kind is BlockKind.TEXT else {}

    def _part(self, block: Block) -> dict[str, Any]:
        part = {"type": _PART_NAMES[block.kind], "text": block.text}
        logprobs = self._logprobs(block.positions)
        return part | self._if_text(block, {"annotations": [], "logprobs": logprobs})

    def _item(self, block: Block) -> dict[str, Any]:
        item: dict[str, Any] = {
            "id": _item_id(block),
            "status": "completed" if block.is_complete else "incomplete",
        }
        match block.kind:
            case BlockKind.TEXT:
                item |= {"type": "message", "role": "assistant", "content": [self._part(block)]}
            case BlockKind.REASONING:
                item |= {"type": "reasoning", "summary": [], "content": [self._part(block)]}
            case BlockKind.CALL:
                item |= {
                    "type": "function_call",
                    "call_id": call_id(self.admitted.syntax, block.id, head="call_"),
                    "name": block.name,
                    "arguments": block.text,
                }
        return item

    def _logprobs(self, positions: Sequence[PositionLogprobs]) -> list[dict[str, Any]]:
        if not self._body.wants_logprobs:
            return []
        with_top = bool(self._body.top_logprobs)
        content: list[dict[str, Any]] = chat_logprobs(
            positions, self._tokenizer, with_top=with_top
        )["content"]
        return content

    def _ended(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The response as it is in the end."""
        is_cut = self.reader.is_cut
        usage = self.record.usage()
        return {
            **self._shared,
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": output,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    **usage["prompt_tokens_details"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self.reader.reasoning_tokens},
                "total_tokens": usage["total_tokens"],
            },
        }

    def _shared_fields(self) -> dict[str, Any]:
        """The fields that a response has from its beginning on."""
        body, admitted = self._body, self.admitted
        sampling, own = admitted.requests[0].sampling, envelope(admitted, "response")
        created = own.pop("created")
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        choice = body.tool_choice or "auto"
        reasoning = body.reasoning
        return {
            **own,
            "created_at": created,
            "completed_at": None,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice,
            "tools": [_tool(tool.model_dump()) for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
            **admitted.head,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event({"type": kind, **fields, "sequence_number": number})


def _item_id(block: Block) -> str:
    heads = {BlockKind.TEXT: "msg_", BlockKind.REASONING: "rs_", BlockKind.CALL: "fc_"}
    return heads[block.kind] + block.id


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "parameters": tool["parameters"] or {}, "strict": bool(tool["strict"])}
