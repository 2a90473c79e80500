"""Turns of a conversation as chat templates expect them."""

import json
from typing import Any

from prefixd.server.api.generate.messages import AssistantTurn, ChatMessage, ToolCall, ToolTurn


def turn_of(message: ChatMessage, text: str) -> dict[str, Any]:
    """The variable of a chat template for a message with this text.

    A field without a value is absent, since templates ask whether it is defined. Text that is null
    is empty: templates add strings.
    """
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text,
    }
    if message.name is not None:
        turn["name"] = message.name
    if isinstance(message, AssistantTurn):
        if message.tool_calls:
            turn["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
    if isinstance(message, ToolTurn):
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    """A past call. Its arguments are an object: templates write them as JSON themselves."""
    arguments = json.loads(call.function.arguments or "{}")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
