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
report.end()
