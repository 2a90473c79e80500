"""Calls of tools and reasoning, typed, in whole answers and in the deltas of streams."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd.client import Client, ToolCall, ToolCallDelta, errors, protocol
from prefixd.client.protocol import NamedTool, Sampling
from prefixd.client.streams import ChunkReader
from prefixd.client.types import FunctionCall, FunctionCallDelta
from prefixd.client.wire import Response
from tests.api import api_world
from tests.api.api_world import make_world
from tests.clients.loopback import serving

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
PET = {"type": "function", "function": {"name": "pet", "parameters": SCHEMA}}
NAMED: NamedTool = {"type": "function", "function": {"name": "pet"}}
ASKED = [{"role": "user", "content": "A dog."}]
CALL = {"id": "c1", "type": "function", "function": {"name": "pet", "arguments": "{}"}}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(api_world, "POOL_BLOCKS", 256)
    monkeypatch.setattr(api_world, "MAX_POSITIONS", 4000)
    with (
        make_world(tmp_path) as world,
        serving(world.app) as url,
        Client(url, api_key=world.keys["acme"]) as connected,
    ):
        yield connected


def test_calls_of_a_server_are_typed_and_can_be_answered(client: Client) -> None:
    fields: Sampling = {"tools": [PET], "tool_choice": NAMED, "temperature": 0, "max_tokens": 96}
    choice = client.chat(ASKED, model="tiny", **fields).choices[0]
    assert (choice.text, choice.finish_reason) == ("", "tool_calls")
    [call] = choice.tool_calls
    assert isinstance(call, ToolCall)
    assert call.function.name == "pet"
    assert json.loads(call.function.arguments)["kind"] in {"dog", "cat"}
    with client.stream_chat(ASKED, model="tiny", **fields) as stream:
        chunks = [piece for chunk in stream for piece in chunk.tool_calls]
    first, *rest = chunks
    assert first.id
    assert (first.index, first.function.name) == (0, "pet")
    assert not any(piece.id or piece.function.name for piece in rest)
    assert "".join(piece.function.arguments for piece in chunks) == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
    assert client.chat([*ASKED, choice.message, result], model="tiny", max_tokens=4).text


def chat(message: object) -> Any:
    body = {"id": "c", "model": "m", "choices": [{"index": 0, "message": message}]}
    return protocol.chat([], model="m").parse(Response(200, {}, json.dumps(body).encode()))


def test_message_of_a_choice_is_the_turn_to_send_back() -> None:
    thought = chat({"content": "Hi", "reasoning_content": "They greet."}).choices[0]
    assert (thought.text, thought.reasoning_content) == ("Hi", "They greet.")
    assert thought.message == {"role": "assistant", "content": "Hi"}
    called = chat({"content": None, "tool_calls": [CALL]}).choices[0]
    assert called.tool_calls == (
        ToolCall(id="c1", function=FunctionCall(name="pet", arguments="{}")),
    )
    assert called.message == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    plain = chat({"content": "Hi", "reasoning_content": None, "tool_calls": None}).choices[0]
    assert (plain.reasoning_content, plain.tool_calls) == (None, ())


def test_deltas_of_a_stream_have_reasoning_and_calls() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant"},
        {"reasoning_content": "Hm"},
        {"tool_calls": [{"index": 0, **CALL, "function": {"name": "pet", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    sent = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    chunks = list(ChunkReader().feed(sent))
    assert [chunk.reasoning_content for chunk in chunks] == [None, "Hm", None, None]
    assert [chunk.tool_calls for chunk in chunks] == [
        (),
        (),
        (ToolCallDelta(index=0, id="c1", function=FunctionCallDelta(name="pet")),),
        (ToolCallDelta(index=0, function=FunctionCallDelta(arguments="{}")),),
    ]


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"tool_calls": [{"id": "c1"}]}, "tool_calls.0.function"),
        ({"tool_calls": 5}, "tool_calls"),
        ({"reasoning_content": 5}, "reasoning_content"),
    ],
)
def test_malformed_call_is_named(message: object, place: str) -> None:
    with pytest.raises(errors.ProtocolError, match=rf"choices\.0\.{place}"):
        chat(message)
