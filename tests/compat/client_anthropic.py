"""The anthropic package of Python."""

from typing import Literal

import anthropic
from pydantic import BaseModel
from report import QUESTION, TOOL, Report, is_weather


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


report = Report("anthropic")
client = anthropic.Anthropic(base_url=report.url.removesuffix("/v1"), api_key=report.key)
FUNCTION = TOOL["function"]
WEATHER = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
MESSAGES = [{"role": "user", "content": QUESTION}]
FIELDS = {
    "model": report.model,
    "messages": MESSAGES,
    "max_tokens": 96,
    "extra_body": {"temperature": 0},
}
ANY = {"type": "any", "disable_parallel_tool_use": True}


def message() -> bool:
    answer = client.messages.create(**FIELDS, system="Be brief.", stop_sequences=["\n\n"])
    is_counted = answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0
    return bool(answer.content[0].text) and is_counted


def prefilled() -> bool:
    begun = [*MESSAGES, {"role": "assistant", "content": "In Oslo"}]
    return bool(client.messages.create(**{**FIELDS, "messages": begun}).content[0].text)


def events() -> bool:
    kinds = [event.type for event in client.messages.create(**FIELDS, stream=True)]
    return kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]


def stream() -> bool:
    with client.messages.stream(**FIELDS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    return text == final.content[0].text != "" and final.stop_reason in {"end_turn", "max_tokens"}


def tool(choice: dict[str, object]) -> bool:
    answer = client.messages.create(**FIELDS, tools=[WEATHER], tool_choice=choice)
    [block] = answer.content
    return answer.stop_reason == "tool_use" and is_weather(block.input)


def streamed_tool() -> bool:
    with client.messages.stream(**FIELDS, tools=[WEATHER], tool_choice=ANY) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        [block] = stream.get_final_message().content
    return len(pieces) > 1 and is_weather(block.input)


def result() -> bool:
    first = client.messages.create(**FIELDS, tools=[WEATHER], tool_choice=ANY)
    [block] = first.content
    content = [{"type": "tool_result", "tool_use_id": block.id, "content": "12 degrees"}]
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": content},
    ]
    answer = client.messages.create(
        **{**FIELDS, "messages": turns}, tools=[WEATHER], tool_choice={"type": "none"}
    )
    return bool(answer.content[0].text)


def parse() -> bool:
    answer = client.messages.parse(**FIELDS, output_format=Weather)
    return isinstance(answer.parsed_output, Weather)


def count() -> bool:
    counted = client.messages.count_tokens(model=report.model, messages=MESSAGES)
    answer = client.messages.create(**{**FIELDS, "max_tokens": 1})
    usage = answer.usage
    return counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def missing() -> bool:
    try:
        client.messages.create(**{**FIELDS, "model": "absent"})
    except anthropic.NotFoundError as error:
        is_named = error.error_code == "model_not_found" and bool(error.request_id)
        return error.type == "not_found_error" and is_named
    return False


def wrong_key() -> bool:
    try:
        client.with_options(api_key="wrong").messages.create(**FIELDS)
    except anthropic.AuthenticationError as error:
        return error.type == "authentication_error"
    return False


def refused() -> bool:
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    try:
        client.messages.create(**{**FIELDS, "messages": [{"role": "user", "content": [image]}]})
    except anthropic.BadRequestError as error:
        return error.type == "invalid_request_error" and "images" in str(error.api_message)
    return False


def other_header() -> bool:
    headers = {"authorization": "", "x-api-key": report.key}
    return bool(client.messages.create(**FIELDS, extra_headers=headers).content)


report.call("models.list", lambda: report.model in [m.id for m in client.models.list()])
report.call("messages", message)
report.call("messages, last turn continued", prefilled)
report.call("messages, events", events)
report.call("messages.stream", stream)
report.call("tools, any", lambda: tool(ANY))
report.call("tools, named", lambda: tool({"type": "tool", "name": "weather"}))
report.call("tools, streamed", streamed_tool)
report.call("result of a tool", result)
report.call("messages.parse", parse)
report.call("count_tokens", count)
report.call("key in x-api-key", other_header)
report.call("error: no such model", missing)
report.call("error: wrong key", wrong_key)
report.call("error: an image", refused)
report.end()
