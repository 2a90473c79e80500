"""The Messages API: what is asked for, answers whole and as events, errors and what is refused."""

import asyncio
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.step import Step, StepOutput
from tests.api.api_world import World, error_of, put_text
from tests.api.test_disconnect import Caller, aborted, run_with_engine
from tests.api.test_tools import WRITTEN, Chat, Writes, roomy, writes

__all__ = ["roomy", "writes"]

PATH = "/v1/messages"
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
CHAT_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": WEATHER["input_schema"],
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def post(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 8, "temperature": 0, **fields}
    return client.post(PATH, json={name: value for name, value in body.items() if value != ...})


def ask(client: TestClient, **fields: Any) -> Any:
    answer = post(client, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def in_chat(chat: Chat, **fields: Any) -> Any:
    return post(chat.client, **{"max_tokens": 200, **fields})


def events_of(answer: Any) -> list[Any]:
    """The payloads of a stream, whose names are checked."""
    assert answer.status_code == 200, answer.text
    events = []
    for frame in filter(None, answer.text.split("\n\n")):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[Any]) -> Any:
    """The message that the events make, as clients join them."""
    start, ping, *events, delta, stop = events
    assert (start["type"], ping["type"]) == ("message_start", "ping")
    assert (delta["type"], stop["type"]) == ("message_delta", "message_stop")
    message = start["message"]
    assert message["content"] == []
    arguments: dict[int, str] = {}
    for event in events:
        kind, index = event["type"].removeprefix("content_block_"), event["index"]
        if kind == "start":
            assert index == len(message["content"])
            message["content"].append(event["content_block"])
            assert event["content_block"].get("text", "") == ""
        elif kind == "delta":
            assert index == len(message["content"]) - 1, "a block that is not open"
            block, fields = message["content"][index], event["delta"]
            match fields["type"]:
                case "text_delta":
                    block["text"] += fields["text"]
                case "thinking_delta":
                    block["thinking"] += fields["thinking"]
                case "input_json_delta":
                    arguments[index] = arguments.get(index, "") + fields["partial_json"]
        else:
            assert kind == "stop"
    for index, text in arguments.items():
        message["content"][index]["input"] = json.loads(text)
    return {**message, **delta["delta"], "usage": delta["usage"]}


def stable(message: Any) -> Any:
    """A message without ids."""
    content = [{n: v for n, v in block.items() if n != "id"} for block in message["content"]]
    return {**message, "id": None, "content": content}


def test_a_message_is_the_text_of_a_chat(client: TestClient, world: World) -> None:
    digest = put_text(client, "voice", "Be kind.", world.headers())["digest"]
    answer = post(client, model="voice@1", kv_reuse=False)
    body = answer.json()
    chat = {"model": "voice@1", "max_tokens": 8, "temperature": 0, "messages": [USER]}
    expected = client.post("/v1/chat/completions", json=chat).json()
    text = expected["choices"][0]["message"]["content"]
    assert body["content"] == [{"type": "text", "text": text, "citations": None}]
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "voice@1")
    assert (body["stop_reason"], body["stop_sequence"]) == ("max_tokens", None)
    assert body["prefix"] == expected["prefix"]
    assert body["prefix"]["digest"] == answer.headers["x-prefixd-prefix-digest"] == digest
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert body["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert body["usage"]["output_tokens"] == 8
    assert stable(
        joined(events_of(post(client, model="voice@1", kv_reuse=False, stream=True)))
    ) == (stable(body))
    long = [{"role": "user", "content": "hi" * 20}]
    total = ask(client, model="voice@1", messages=long, kv_reuse=False)["usage"]["input_tokens"]
    ask(client, model="voice@1", messages=long)
    usage = ask(client, model="voice@1", messages=long)["usage"]
    assert usage["cache_read_input_tokens"] > 0
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == total


def test_a_stop_sequence_is_named(client: TestClient) -> None:
    text = ask(client)["content"][0]["text"]
    body = ask(client, stop_sequences=["\n", text[3]])
    assert body["content"][0]["text"] == text[:3]
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", text[3])
    nothing = post(client, stop_sequences=[text[0]], stream=True)
    assert joined(events_of(nothing))["content"] == []


def test_the_model_ends_its_turn(writes: Writes) -> None:
    body = in_chat(writes("qwen2.5", "Yes.")).json()
    assert (body["stop_reason"], body["content"][0]["text"]) == ("end_turn", "Yes.")


def test_the_user_of_the_metadata_is_bound_to_a_prefix(client: TestClient, world: World) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"})
    for fields in ({"metadata": {"user_id": "ann"}}, {"user": "ann"}):
        assert ask(client, **fields)["prefix"]["chosen_by"] == "user"
    assert ask(client, metadata={"user_id": "bob"})["prefix"] is None
    refused = post(client, metadata={"user_id": "ann"}, user="bob")
    assert error_of(refused)["param"] == "metadata.user_id"


@pytest.mark.parametrize("kind", ["qwen2.5", "mistral"])
def test_calls_and_text_are_blocks(writes: Writes, kind: str) -> None:
    before = "Let me see.\n" if kind == "qwen2.5" else ""
    chat = writes(kind, before + WRITTEN[kind])
    body = in_chat(chat, tools=[WEATHER]).json()
    *texts, call = body["content"]
    assert [block["text"] for block in texts] == ["Let me see."] * bool(before)
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    assert len(call["id"]) == 9 if kind == "mistral" else call["id"].startswith("toolu_")
    assert body["stop_reason"] == "tool_use"
    events = events_of(in_chat(chat, tools=[WEATHER], stream=True, kv_reuse=False))
    assert stable(joined(events)) == stable(in_chat(chat, tools=[WEATHER], kv_reuse=False).json())
    partial = [event for event in events if event.get("delta", {}).get("partial_json")]
    assert len(partial) > 5, "arguments are not streamed"
    assert ask_choice(chat, {"type": "none"})["stop_reason"] == "end_turn"
    once = {"type": "auto", "disable_parallel_tool_use": True}
    assert ask_choice(chat, once)["stop_reason"] == "tool_use"


def ask_choice(chat: Chat, choice: dict[str, Any]) -> Any:
    answer = in_chat(chat, tools=[WEATHER], tool_choice=choice)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_cut_call_has_the_arguments_that_came(writes: Writes) -> None:
    chat = writes("qwen2.5", WRITTEN["qwen2.5"])
    whole = len(WRITTEN["qwen2.5"])
    inputs = []
    for limit in range(1, whole):
        body = in_chat(chat, tools=[WEATHER], max_tokens=limit).json()
        if body["stop_reason"] != "max_tokens":
            break
        inputs += [block["input"] for block in body["content"] if block["type"] == "tool_use"]
    assert {} in inputs
    assert all(isinstance(each, dict) for each in inputs)


def test_calls_that_are_no_json_are_text(writes: Writes) -> None:
    broken = '<tool_call>\n{"name": "weather", "arguments": {"city": Oslo}}\n</tool_call>'
    chat = writes("qwen2.5", "Well.\n" + broken)
    body = in_chat(chat, tools=[WEATHER]).json()
    assert [block["type"] for block in body["content"]] == ["text"]
    assert body["stop_reason"] == "end_turn"
    *_, delta, _ = events_of(in_chat(chat, tools=[WEATHER], stream=True))
    assert delta["delta"]["stop_reason"] == "end_turn"


REASONED = "<think>\nHm.\n</think>\n\nYes."


def test_thinking_is_off_unless_asked_for(writes: Writes) -> None:
    chat = writes("qwen3", REASONED)
    enabled = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "kv_reuse": False}
    body = in_chat(chat, **enabled).json()
    assert body["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert body["content"][1]["text"] == "Yes."
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    assert chat.prompts[-1].endswith("assistant\n")
    assert stable(joined(events_of(in_chat(chat, stream=True, **enabled)))) == stable(body)
    omitted = {"thinking": {"type": "adaptive", "display": "omitted"}}
    for fields in ({}, {"thinking": {"type": "disabled"}}, omitted):
        content = in_chat(chat, **fields).json()["content"]
        assert [block["type"] for block in content] == ["text"], fields
        assert chat.prompts[-1].endswith("</think>\n\n") == (fields is not omitted)


def test_a_model_that_cannot_think_refuses_to(client: TestClient) -> None:
    enabled = {"type": "enabled", "budget_tokens": 1024}
    error = error_of(post(client, thinking=enabled))
    assert (error["code"], error["param"]) == ("unsupported_field", "thinking")
    for kind in ("adaptive", "disabled"):
        assert post(client, thinking={"type": kind}).status_code == 200


def test_messages_become_turns(writes: Writes) -> None:
    chat = writes("qwen2.5", "It is warm.")
    cached = {"cache_control": {"type": "ephemeral"}}
    content = [
        {"type": "tool_result", "tool_use_id": "a23456789", "content": [text("20")], **cached},
        text("So?", **cached),
    ]
    said = [
        {"type": "thinking", "thinking": "", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        text("Let me see."),
        {"type": "tool_use", "id": "a23456789", "name": "weather", "input": {"city": "Oslo"}},
    ]
    messages = [
        {"role": "user", "content": "Warm?"},
        {"role": "user", "content": [text("In Oslo?")]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": content},
    ]
    system = [text("Be kind."), text("Be brief.", **cached)]
    tools = [{**WEATHER, "type": "custom", **cached}]
    answer = in_chat(chat, messages=messages, system=system, tools=tools)
    assert answer.json()["content"][0]["text"] == "It is warm."
    given = chat.prompts[-1]
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    chat.post(
        messages=[
            {"role": "system", "content": "Be kind.\nBe brief."},
            {"role": "user", "content": "Warm?\nIn Oslo?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"id": "a23456789", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "a23456789", "content": "20"},
            {"role": "user", "content": "So?"},
        ],
        tools=[CHAT_TOOL],
    )
    assert given == chat.prompts[-1]


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def test_the_last_message_of_the_assistant_is_continued(writes: Writes) -> None:
    chat = writes("qwen2.5", " warm.")
    begun = [USER, {"role": "assistant", "content": "It is"}]
    assert in_chat(chat, messages=begun).json()["content"][0]["text"] == " warm."
    assert chat.prompts[-1].endswith("It is")
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    refused = in_chat(chat, messages=[USER, {"role": "assistant", "content": [call]}])
    assert error_of(refused)["param"] == "messages"


def test_the_text_matches_a_schema(client: TestClient) -> None:
    asked = {"format": {"type": "json_schema", "schema": SCHEMA}}
    body = ask(client, output_config=asked, max_tokens=60)
    assert json.loads(body["content"][0]["text"])["kind"] in {"dog", "cat"}
    body = ask(client, structured_outputs={"regex": "[ab]{2}"})
    assert set(body["content"][0]["text"]) <= {"a", "b"}


def test_tokens_of_a_prompt_are_counted(client: TestClient, world: World) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    for model in ("tiny", "voice"):
        asked = {"model": model, "messages": [USER], "system": "Be brief."}
        answer = client.post(f"{PATH}/count_tokens?beta=true", json=asked)
        usage = ask(client, model=model, system="Be brief.", kv_reuse=False)["usage"]
        assert answer.json() == {"input_tokens": usage["input_tokens"]}
    missing = client.post(f"{PATH}/count_tokens", json={"model": "absent", "messages": [USER]})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": ...}, "max_tokens", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": 500}, "max_tokens", "context_length_exceeded"),
        ({"messages": []}, "messages", "invalid_request"),
        (
            {"system": "Be brief.", "messages": [{"role": "user", "content": []}]},
            "messages",
            "invalid_request",
        ),
        ({"messages": [{**USER, "content": "x" * 500}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "tool"}]}, "messages[0].role", "invalid_request"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].image",
            "unsupported_field",
        ),
        ({"mcp_servers": [{}]}, "mcp_servers", "unsupported_field"),
        ({"container": "c"}, "container", "unsupported_field"),
        ({"n": 2}, "n", "unknown_field"),
        (
            {"tools": [{"type": "bash_20250124", "name": "bash"}]},
            "tools[0].type",
            "unsupported_field",
        ),
        ({"tools": [{"name": "weather"}]}, "tools[0].input_schema", "invalid_request"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "invalid_request"),
        ({"tools": [WEATHER]}, "tool_choice", "tools_unsupported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "invalid_request"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type", "invalid_request"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}},
            "tool_choice.name",
            "invalid_request",
        ),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "invalid_request"),
        ({"output_config": {"effort": "low"}}, "output_config.effort", "invalid_request"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "output_config.format",
            "invalid_grammar",
        ),
        ({"metadata": {"user_id": ""}}, "metadata.user_id", "invalid_request"),
    ],
)
def test_refusals_name_the_place_in_this_shape(
    client: TestClient, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = post(client, **fields)
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert "'required'" not in error["message"]


def test_errors_outside_of_the_route_have_the_same_shape(client: TestClient, world: World) -> None:
    def kind(answer: Any) -> tuple[int, str]:
        return answer.status_code, error_of(answer)["type"]

    assert kind(client.post(f"{PATH}/batches")) == (404, "not_found_error")
    assert kind(client.get(PATH)) == (405, "invalid_request_error")
    assert kind(post(client, model="absent")) == (404, "not_found_error")
    large = [{"role": "user", "content": "x" * 70_000}]
    assert kind(post(client, messages=large)) == (413, "request_too_large")
    json_headers = {"content-type": "application/json"}
    assert kind(client.post(PATH, content=b"{", headers=json_headers))[0] == 400
    reader = world.headers("acme:read")
    assert kind(client.post(PATH, json={}, headers=reader)) == (403, "permission_error")
    slow = post(client, max_tokens=300, timeout=1e-9)
    assert kind(slow) == (504, "timeout_error")
    world.tenants.set_quota("acme", {"requests_per_minute": 1})
    post(client)
    assert kind(post(client)) == (429, "rate_limit_error")
    del client.headers["authorization"]
    assert kind(post(client)) == (401, "authentication_error")
    assert "request-id" not in client.get("/health/live").headers


def test_a_stopping_server_and_a_failing_one(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.runner.fail = True
    answer = post(client)
    assert (answer.status_code, error_of(answer)["type"]) == (500, "api_error")
    monkeypatch.setattr(world.limiter, "admit", lambda *_, **__: 1 / 0)
    world.tenants.set_quota("acme", {"requests_per_minute": 100})
    assert error_of(post(client))["code"] == "internal_error"
    world.drain_state.closed = True
    answer = post(client)
    assert (answer.status_code, error_of(answer)["type"]) == (503, "overloaded_error")


def test_a_key_may_come_in_either_header(client: TestClient, world: World) -> None:
    key, other = world.keys["acme"], world.keys["acme:read"]
    del client.headers["authorization"]
    version = {"anthropic-version": "2023-06-01"}
    for path in ("/v1/models", "/v1/models/tiny"):
        assert client.get(path, headers={"x-api-key": key, **version}).status_code == 200
    assert client.get("/v1/models", headers={"x-api-key": "wrong"}).status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": ""}).status_code == 401
    both = {"authorization": f"Bearer {other}", "x-api-key": key}
    body = {"model": "tiny", "max_tokens": 1, "messages": [USER]}
    assert client.post(PATH, json=body, headers={"x-api-key": key}).status_code == 200
    assert client.post(PATH, json=body, headers=both).status_code == 403, "bearer keys win"


def test_an_error_in_a_stream_is_its_last_event(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.runner.run

    def fail_later(step: Step) -> StepOutput:
        world.runner.fail = len(world.runner.steps) > 2
        return run(step)

    monkeypatch.setattr(world.runner, "run", fail_later)
    answer = post(client, stream=True)
    *_, last = events_of(answer)
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert last["error"]["details"]["error_code"] == "engine_error"
    assert last["request_id"] == answer.headers["request-id"]


def test_a_disconnect_aborts(world: World) -> None:
    world.runner.hold_after = 3

    async def scenario() -> None:
        caller = Caller(world, {}, PATH)
        body = {"model": "tiny", "messages": [USER], "stream": True, "max_tokens": 300}
        caller.body = json.dumps(body).encode()
        request = asyncio.create_task(caller.run())
        assert await asyncio.to_thread(world.runner.held.wait, 20)
        caller.disconnects.set()
        await request
        world.runner.gate.set()
        assert await aborted(world) == 1

    run_with_engine(world, scenario)


def test_requests_count_in_limits_and_metrics(client: TestClient, world: World) -> None:
    world.tenants.set_quota("acme", {"requests_per_minute": 1})
    assert post(client).headers["x-ratelimit-limit-requests"] == "1"
    assert post(client).headers["retry-after"]
    page = client.get("/metrics").text
    assert 'prefixd_generation_requests_total{endpoint="messages",outcome="ok"} 1.0' in page
