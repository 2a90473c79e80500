"""POST /v1/responses: what is asked for, answers whole and as events, and what is refused."""

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.step import Step, StepOutput
from tests.api.api_world import World, error_of, put_text
from tests.api.test_disconnect import Caller, aborted, run_with_engine
from tests.api.test_openai_client import api, url
from tests.api.test_tools import WRITTEN, Chat, Writes, roomy, writes

__all__ = ["api", "roomy", "url", "writes"]

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
ARGUMENTS = '{"city": "Oslo"}'
CALL = {"type": "function_call", "call_id": "a23456789", "name": "weather", "arguments": ARGUMENTS}
RESULT = {"type": "function_call_output", "call_id": "a23456789", "output": "20"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat", None]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def post(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 8, "temperature": 0, **fields}
    return client.post(PATH, json=body)


def ask(client: TestClient, **fields: Any) -> Any:
    answer = post(client, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(answer: Any) -> list[Any]:
    """The payloads of a stream, whose names and numbers are checked."""
    assert answer.status_code == 200, answer.text
    events = []
    for number, frame in enumerate(filter(None, answer.text.split("\n\n"))):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def in_chat(chat: Chat, **fields: Any) -> Any:
    body = {"model": "tiny", "input": "hi", "max_output_tokens": 200, **fields}
    return chat.client.post(PATH, json=body)


def stable(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in {"id", "call_id"}}


def test_a_response_is_the_text_of_a_chat(client: TestClient, world: World) -> None:
    digest = put_text(client, "voice", "Be kind.", world.headers())["digest"]
    answer = post(client, model="voice@1", metadata={"a": "b"}, user="ann", top_p=0.5)
    body = answer.json()
    chat = {"model": "voice@1", "max_tokens": 8, "temperature": 0}
    messages = [{"role": "user", "content": "hi"}]
    expected = client.post("/v1/chat/completions", json={**chat, "messages": messages}).json()
    [item] = body["output"]
    text = expected["choices"][0]["message"]["content"]
    assert item["content"] == [
        {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    ]
    assert body["id"].startswith("resp_")
    assert item["id"].startswith("msg_")
    assert body["prefix"] == expected["prefix"]
    assert body["prefix"]["digest"] == answer.headers["x-prefixd-prefix-digest"] == digest
    assert answer.headers["x-prefixd-prefix"] == "voice@1"
    assert (body["status"], item["status"]) == ("incomplete", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    usage = expected["usage"]
    assert body["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert body["usage"]["output_tokens"] == usage["completion_tokens"] == 8
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 0
    assert ask(client, model="voice@1", input="hi" * 20, kv_reuse=True)
    again = ask(client, model="voice@1", input="hi" * 20)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0
    echoed = {"metadata": {"a": "b"}, "user": "ann", "top_p": 0.5, "temperature": 0}
    echoed |= {"store": False, "truncation": "disabled", "background": False, "error": None}
    echoed |= {"previous_response_id": None, "max_output_tokens": 8, "parallel_tool_calls": True}
    assert echoed.items() <= body.items()


def test_a_stop_completes_a_response(client: TestClient) -> None:
    text = ask(client)["output"][0]["content"][0]["text"]
    body = ask(client, stop=[text[3]])
    assert body["output"][0]["content"][0]["text"] == text[:3]
    assert (body["status"], body["output"][0]["status"]) == ("completed", "completed")
    assert body["incomplete_details"] is None
    assert body["completed_at"] >= body["created_at"]
    nothing = ask(client, stop=[text[0]])
    assert nothing["output"][0]["content"][0]["text"] == ""
    *_, last = events_of(post(client, stop=[text[0]], stream=True))
    assert [stable(item) for item in last["response"]["output"]] == [
        stable(item) for item in nothing["output"]
    ]


def test_the_user_is_bound_to_a_prefix(client: TestClient, world: World) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"})
    assert ask(client, user="ann")["prefix"]["chosen_by"] == "user"
    assert ask(client)["prefix"] is None


def test_events_of_a_text(client: TestClient) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    fields["kv_reuse"] = False
    whole = ask(client, **fields)
    events = events_of(post(client, stream=True, **fields))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == ""
    [item] = whole["output"]
    text = [event for event in events if event["type"].endswith("text.delta")]
    assert "".join(event["delta"] for event in text) == item["content"][0]["text"]
    logprobs = [entry for event in text for entry in event["logprobs"]]
    assert logprobs == item["content"][0]["logprobs"]
    assert len(logprobs) == 8
    assert len(logprobs[0]["top_logprobs"]) == 1
    last = events[-1]["response"]
    assert last["output"][0] == events[-2]["item"]
    assert stable(last["output"][0]) == stable(item)
    for name in ("usage", "status", "incomplete_details", "model", "prefix"):
        assert last[name] == whole[name], name


def test_calls_and_text_are_items(writes: Writes) -> None:
    text = "Let me see.\n" + WRITTEN["qwen2.5"] + "\n" + WRITTEN["qwen2.5"]
    chat = writes("qwen2.5", text)
    body = in_chat(chat, tools=[WEATHER]).json()
    message, *calls = body["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", ARGUMENTS)] * 2
    assert len({call["call_id"] for call in calls}) == 2
    assert all(call["call_id"].startswith("call_") for call in calls)
    assert body["status"] == "completed"
    assert body["tools"] == [{**WEATHER, "strict": False}]
    events = events_of(in_chat(chat, tools=[WEATHER], stream=True))
    assert events[-1]["type"] == "response.completed"
    output = events[-1]["response"]["output"]
    assert [stable(item) for item in output] == [stable(item) for item in body["output"]]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert done == output
    assert [item["id"] for item in added] == [item["id"] for item in output]
    assert [item.get("arguments") for item in added] == [None, "", ""]
    for call in output[1:]:
        own = [event for event in events if event.get("item_id") == call["id"]]
        assert "".join(event.get("delta", "") for event in own) == ARGUMENTS
        assert len(own) > 5, "arguments are not streamed"
        assert own[-1]["type"] == "response.function_call_arguments.done"
        assert own[-1]["arguments"] == ARGUMENTS
    once = in_chat(chat, tools=[WEATHER], parallel_tool_calls=False).json()
    assert [item["type"] for item in once["output"]] == ["message", "function_call"]


def test_reasoning_is_an_item(writes: Writes) -> None:
    chat = writes("qwen3", "<think>\nHm.\n</think>\n\nYes.")
    fields = {"include": ["message.output_text.logprobs"]}
    body = in_chat(chat, **fields).json()
    reasoning, message = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Yes."
    texts = "".join(entry["token"] for entry in message["content"][0]["logprobs"])
    assert texts.strip() == "Yes."
    usage = body["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    events = events_of(in_chat(chat, stream=True))
    deltas = [e["delta"] for e in events if e["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Hm."
    kinds = [event["item"]["type"] for event in events if event["type"].endswith("item.done")]
    assert kinds == ["reasoning", "message"]
    hidden = in_chat(chat, include_reasoning=False).json()
    assert [item["type"] for item in hidden["output"]] == ["message"]
    assert in_chat(chat, reasoning={"effort": "none"}).status_code == 200
    assert chat.prompts[-1].endswith("<think>\n\n</think>\n\n")


def test_calls_that_are_no_json_are_text_or_incomplete(writes: Writes) -> None:
    broken = '<tool_call>\n{"name": "weather", "arguments": {"city": Oslo}}\n</tool_call>'
    chat = writes("qwen2.5", "Well.\n" + broken + "\nSo.")
    body = in_chat(chat, tools=[WEATHER]).json()
    [message] = body["output"]
    assert message["content"][0]["text"].startswith("Well.")
    assert "Oslo" in message["content"][0]["text"]
    events = events_of(in_chat(chat, tools=[WEATHER], stream=True))
    items = events[-1]["response"]["output"]
    assert [(item["type"], item["status"]) for item in items] == [
        ("message", "completed"),
        ("function_call", "incomplete"),
        ("message", "completed"),
    ]


def test_items_become_turns(writes: Writes) -> None:
    chat = writes("qwen2.5", "It is warm.")
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    said = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
    }
    question = {"role": "user", "content": [{"type": "input_text", "text": "Warm?"}]}
    items = [question, thought, said, CALL, RESULT, {"role": "developer", "content": "Be brief."}]
    answer = in_chat(chat, input=items, instructions="Be kind.", tools=[WEATHER])
    assert answer.json()["output"][0]["content"][0]["text"] == "It is warm."
    given = chat.prompts[-1]
    call = {"name": "weather", "arguments": ARGUMENTS}
    chat.post(
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Warm?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"id": "a23456789", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "a23456789", "content": "20"},
            {"role": "system", "content": "Be brief."},
        ],
        tools=[{"type": "function", "function": {k: WEATHER[k] for k in list(WEATHER)[1:]}}],
    )
    assert given == chat.prompts[-1]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_field"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_field"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_field"),
        ({"background": True}, "background", "unsupported_field"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_field"),
        ({"truncation": "auto"}, "truncation", "unsupported_field"),
        ({"messages": []}, "messages", "unknown_field"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_field"),
        ({"tool_choice": {"type": "custom", "name": "a"}}, "tool_choice", "unsupported_field"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_request"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice.name",
            "invalid_request",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "invalid_request"),
        ({"tools": [WEATHER]}, "tool_choice", "tools_unsupported"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_field"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_request"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "invalid_request"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
            "text.format",
            "invalid_grammar",
        ),
        ({"input": []}, "input", "invalid_request"),
        ({"input": ""}, "input", "invalid_request"),
        ({"input": 3}, "input", "invalid_request"),
        ({"input": "x" * 500}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 500}, "max_output_tokens", "context_length_exceeded"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type", "unsupported_field"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "unsupported_field"),
        ({"input": [{**CALL, "arguments": "x"}]}, "input[0].arguments", "invalid_request"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].input_image",
            "unsupported_field",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_request"),
        ({"stream_options": {}}, "stream_options", "invalid_request"),
    ],
)
def test_refusals_name_the_place_in_this_shape(
    client: TestClient, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = post(client, **fields)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert "response_format" not in error["message"]


def test_neutral_values_and_ignored_fields_are_accepted(client: TestClient) -> None:
    assert ask(
        client,
        store=False,
        previous_response_id=None,
        background=False,
        truncation="disabled",
        parallel_tool_calls=True,
        service_tier="auto",
        prompt_cache_key="k",
        reasoning={"effort": None, "summary": "auto"},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        include=["reasoning.encrypted_content"],
        tools=[],
        top_k=1,
        seed=3,
    )


def test_a_failure_in_a_stream_is_its_last_event(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.runner.run

    def fail_later(step: Step) -> StepOutput:
        world.runner.fail = len(world.runner.steps) > 2
        return run(step)

    monkeypatch.setattr(world.runner, "run", fail_later)
    *_, last = events_of(post(client, stream=True))
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "engine_error"
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert post(client).status_code == 500


def test_a_disconnect_aborts(world: World) -> None:
    world.runner.hold_after = 3

    async def scenario() -> None:
        body = {"input": "hi", "stream": True, "max_output_tokens": 300}
        caller = Caller(world, body, PATH)
        caller.body = json.dumps({"model": "tiny", **body}).encode()
        request = asyncio.create_task(caller.run())
        assert await asyncio.to_thread(world.runner.held.wait, 20)
        caller.disconnects.set()
        await request
        world.runner.gate.set()
        assert await aborted(world) == 1

    run_with_engine(world, scenario)


def test_requests_count_in_limits_metrics_and_usage(client: TestClient, world: World) -> None:
    world.tenants.set_quota("acme", {"tokens_per_minute": 1000, "requests_per_minute": 2})
    answer = post(client)
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert post(client).status_code == 200
    assert post(client).status_code == 429
    page = client.get("/metrics").text
    count = 'prefixd_generation_requests_total{endpoint="responses",outcome="ok"} 2.0'
    assert count in page


def test_embeddings_are_refused_by_name(client: TestClient, world: World) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "embeddings_unsupported"
    reader = world.headers("acme:read")
    assert client.post("/v1/embeddings", json={}, headers=reader).status_code == 403


class Pet(pydantic.BaseModel):
    kind: str


def test_the_openai_client_reads_responses(roomy: None, api: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "hi", "temperature": 0}
    answer = api.responses.create(**fields, max_output_tokens=8)
    assert len(answer.output_text) == 8
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8
    streamed = api.responses.create(**fields, max_output_tokens=8, stream=True)
    deltas = [event.delta for event in streamed if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
    tool: Any = {"type": "function", "name": "pet", "parameters": SCHEMA, "strict": True}
    fields |= {"max_output_tokens": 96, "parallel_tool_calls": False}
    with api.responses.stream(**fields, tools=[tool], tool_choice="required") as stream:
        final = stream.get_final_response()
    call = final.output[0]
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"kind"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "ok"}
    turns: Any = [{"role": "user", "content": "hi"}, call, result]
    assert api.responses.create(model="tiny", input=turns, max_output_tokens=4).output_text
    with pytest.raises(openai.BadRequestError, match="'store'"):
        api.responses.create(**fields, store=True)
