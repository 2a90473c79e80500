"""Turns with tools for models whose chat template has none: as text."""

import json
from collections.abc import Sequence
from typing import Any

Turn = dict[str, Any]

_INSTRUCTIONS = """You can call these functions:
{functions}
To call functions, answer with a JSON list of calls and nothing else:
[{{"name": "the name of a function", "arguments": {{an object that matches its parameters}}}}]"""


def with_instructions(turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> list[Turn]:
    """The turns with the tools described in the system turn, which is added if there is none."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = _INSTRUCTIONS.format(functions="\n".join(lines))
    if turns and turns[0]["role"] == "system":
        first, *others = turns
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *others]
    return [{"role": "system", "content": text}, *turns]


def without_tool_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with calls as text of the assistant, and their results as text of the user."""
    names: dict[str, str] = {}
    plain: list[Turn] = []
    for turn in turns:
        if turn["role"] == "tool":
            name = turn.get("name") or names.get(turn["tool_call_id"], "the function")
            plain.append({"role": "user", "content": f"Result of {name}: {turn['content']}"})
        elif "tool_calls" in turn:
            calls = [call["function"] for call in turn["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in turn["tool_calls"]}
            texts = [turn["content"], json.dumps(calls, ensure_ascii=False)]
            plain.append({"role": "assistant", "content": "\n".join(filter(None, texts))})
        else:
            plain.append(turn)
    return plain
