"""The openai package of Python."""

import json
import time
from typing import Literal

import openai
from pydantic import BaseModel
from report import QUESTION, TOOL, Report, is_weather


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


report = Report("openai")
client = openai.OpenAI(base_url=report.url, api_key=report.key)
MESSAGES = [{"role": "user", "content": QUESTION}]
FIELDS = {"model": report.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 96}
NAMED = {"type": "function", "function": {"name": "weather"}}


def completion() -> bool:
    answer = client.completions.create(model=report.model, prompt="One", max_tokens=4, logprobs=2)
    return bool(answer.choices[0].text) and len(answer.choices[0].logprobs.tokens) == 4


def chat() -> bool:
    return bool(client.chat.completions.create(**FIELDS).choices[0].message.content)


def stream() -> bool:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**FIELDS, stream=True, stream_options=options))
    return chunks[-1].usage.completion_tokens > 0 and any(
        chunk.choices and chunk.choices[0].delta.content for chunk in chunks
    )


def tool(choice: object) -> bool:
    answer = client.chat.completions.create(**FIELDS, tools=[TOOL], tool_choice=choice)
    call = answer.choices[0].message.tool_calls[0]
    return answer.choices[0].finish_reason == "tool_calls" and is_weather(
        json.loads(call.function.arguments)
    )


def streamed_tool() -> bool:
    chunks = client.chat.completions.create(**FIELDS, tools=[TOOL], tool_choice=NAMED, stream=True)
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    text = "".join(delta.function.arguments or "" for delta in deltas)
    return deltas[0].function.name == "weather" and is_weather(json.loads(text))


def result() -> bool:
    first = client.chat.completions.create(**FIELDS, tools=[TOOL], tool_choice="required")
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
        for call in message.tool_calls
    ]
    fields = {**FIELDS, "messages": [*MESSAGES, message, *results]}
    return bool(client.chat.completions.create(**fields).choices[0].message.content)


def parse() -> bool:
    answer = client.chat.completions.parse(**FIELDS, response_format=Weather)
    return isinstance(answer.choices[0].message.parsed, Weather)


def parse_tool() -> bool:
    tools = [openai.pydantic_function_tool(Weather)]
    answer = client.chat.completions.parse(**FIELDS, tools=tools, tool_choice="required")
    call = answer.choices[0].message.tool_calls[0]
    return isinstance(call.function.parsed_arguments, Weather)


def upload(texts: list[str]) -> openai.types.FileObject:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**FIELDS, "messages": [{"role": "user", "content": text}], "max_tokens": 8},
        }
        for number, text in enumerate(texts)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=("lines.jsonl", content), purpose="batch")


def files() -> bool:
    file = upload(["One"])
    listed = file.id in [each.id for each in client.files.list(purpose="batch")]
    content = client.files.content(file.id).text
    same = client.files.retrieve(file.id).bytes == len(content.encode())
    return listed and same and client.files.delete(file.id).deleted


def batch() -> bool:
    file = upload(["One", "Two", "Three"])
    made = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"from": "compat"},
    )
    while client.batches.retrieve(made.id).status not in {"completed", "failed"}:
        time.sleep(0.2)
    ended = client.batches.retrieve(made.id)
    answers = [json.loads(line) for line in client.files.content(ended.output_file_id).iter_lines()]
    return (
        ended.request_counts.completed == 3
        and [answer["custom_id"] for answer in answers] == ["line-0", "line-1", "line-2"]
        and all(answer["response"]["body"]["choices"] for answer in answers)
        and made.id in [each.id for each in client.batches.list(limit=1)]
    )


def cancelled_batch() -> bool:
    file = upload(["One"] * 200)
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    return client.batches.cancel(made.id).status == "cancelling"


ITEMS = {"model": report.model, "input": QUESTION, "temperature": 0, "max_output_tokens": 96}
FLAT = {"type": "function", **TOOL["function"], "strict": True}
REQUIRED = {"tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False}


def response() -> bool:
    answer = client.responses.create(**ITEMS, instructions="Be brief.", metadata={"a": "b"})
    is_counted = answer.usage.output_tokens > 0 and answer.usage.input_tokens > 0
    return bool(answer.output_text) and is_counted and not answer.store


def streamed_response() -> bool:
    with client.responses.stream(**{**ITEMS, "max_output_tokens": 256}) as stream:
        deltas = [each.delta for each in stream if each.type == "response.output_text.delta"]
        final = stream.get_final_response()
    return "".join(deltas) == final.output_text != ""


def response_with_tool() -> bool:
    first = client.responses.create(**ITEMS, **REQUIRED)
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    turns = [{"role": "user", "content": QUESTION}, *first.output, result]
    second = client.responses.create(**{**ITEMS, "input": turns}, tools=[FLAT], tool_choice="none")
    return is_weather(json.loads(call.arguments)) and bool(second.output_text)


def streamed_response_with_tool() -> bool:
    with client.responses.stream(**ITEMS, **REQUIRED) as stream:
        kinds = [each.type for each in stream]
        [call] = stream.get_final_response().output
    is_streamed = kinds.count("response.function_call_arguments.delta") > 1
    return is_streamed and is_weather(json.loads(call.arguments))


def parsed_response() -> bool:
    answer = client.responses.parse(**ITEMS, text_format=Weather)
    return isinstance(answer.output_parsed, Weather)


def refused_response() -> bool:
    try:
        client.responses.create(**ITEMS, previous_response_id="resp_1")
    except openai.BadRequestError as error:
        return error.param == "previous_response_id" and error.code == "unsupported_field"
    return False


report.call("models.list", lambda: report.model in [m.id for m in client.models.list()])
report.call("completions", completion)
report.call("chat.completions", chat)
report.call("chat.completions, streamed", stream)
report.call("tools, required", lambda: tool("required"))
report.call("tools, named", lambda: tool(NAMED))
report.call("tools, streamed", streamed_tool)
report.call("result of a tool", result)
report.call("parse, response_format", parse)
report.call("parse, tools", parse_tool)
report.call("files", files)
report.call("batches", batch)
report.call("batches, cancelled", cancelled_batch)
report.call("responses", response)
report.call("responses, streamed", streamed_response)
report.call("responses, tools and a result", response_with_tool)
report.call("responses, tools, streamed", streamed_response_with_tool)
report.call("responses.parse", parsed_response)
report.call("responses, refusal of what would be stored", refused_response)
report.end()
